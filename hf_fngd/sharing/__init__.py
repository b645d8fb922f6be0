"""Sharing policies: one file each, behind one registry (`hf_fngd.sharing.base`)."""

from hf_fngd.sharing.base import BatchInfo, SharingPolicy, make_policy, policy_names, register_policy
from hf_fngd.sharing.clipped import ClippedSharing
from hf_fngd.sharing.index import IndexSharing, add_index
from hf_fngd.sharing.last import LastSharing
from hf_fngd.sharing.never import NeverSharing
from hf_fngd.sharing.ranked import RankedSharing
from hf_fngd.sharing.replay import ReplaySharing
from hf_fngd.sharing.sketched import SketchedSharing
from hf_fngd.sharing.suspects import INDEX_COLUMN, WEIGHT_COLUMN, Suspects
from hf_fngd.sharing.uniform import UniformSharing

__all__ = [
    "INDEX_COLUMN",
    "WEIGHT_COLUMN",
    "BatchInfo",
    "ClippedSharing",
    "IndexSharing",
    "LastSharing",
    "NeverSharing",
    "RankedSharing",
    "ReplaySharing",
    "SharingPolicy",
    "SketchedSharing",
    "Suspects",
    "UniformSharing",
    "add_index",
    "make_policy",
    "policy_names",
    "register_policy",
]
