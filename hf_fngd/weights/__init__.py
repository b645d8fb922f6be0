"""Sharing policies, one file each behind one registry, and the pure functions behind them."""

from hf_fngd.weights import clipped, replay, solved, uniform
from hf_fngd.weights.base import register_policy

__all__ = ["clipped", "register_policy", "replay", "solved", "uniform"]
