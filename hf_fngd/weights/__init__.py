"""Sharing policies, one file each behind one registry, and the pure functions behind them."""

from hf_fngd.weights import clipped, never, replay, uniform
from hf_fngd.weights.base import register_policy

__all__ = ["clipped", "never", "register_policy", "replay", "uniform"]
