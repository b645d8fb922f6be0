"""Sharing policies, one file each behind one registry, and the pure functions behind them."""

from hf_fngd.weights.base import (
    MicroBatchWeights,
    Samples,
    SharingPolicy,
    make_policy,
    policies_that,
    policy_class,
    policy_names,
    register_policy,
)
from hf_fngd.weights.clipped import ClippedSharing
from hf_fngd.weights.never import NeverSharing
from hf_fngd.weights.replay import ReplaySharing
from hf_fngd.weights.solved import SolvedPolicy
from hf_fngd.weights.uniform import UniformSharing

__all__ = [
    "ClippedSharing",
    "MicroBatchWeights",
    "NeverSharing",
    "ReplaySharing",
    "Samples",
    "SharingPolicy",
    "SolvedPolicy",
    "UniformSharing",
    "make_policy",
    "policies_that",
    "policy_class",
    "policy_names",
    "register_policy",
]
