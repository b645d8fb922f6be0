"""Update rules, one file each behind one registry, parameter groups, and the norms of gradients."""

from hf_fngd.updates import adam, block_muon, momentum, muon, orthogonal
from hf_fngd.updates.base import RULES, Update, register_rule

FALLBACK_RULES = {"adamw": "adam", "sgd": "momentum"}  # by their names in the argument ``fallback``

__all__ = ["FALLBACK_RULES", "RULES", "Update", "adam", "block_muon", "momentum", "muon", "orthogonal", "register_rule"]
