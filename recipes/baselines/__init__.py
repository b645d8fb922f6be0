"""Optimizers to compare FNGD with: the matrices that FNGD preconditions get the named rule, the rest AdamW."""

from baselines.factory import BASELINES, BaselineFactory

__all__ = ["BASELINES", "BaselineFactory"]
