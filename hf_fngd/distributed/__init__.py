"""Several processes: what they exchange, tensors that are sharded over them, and environments that are refused."""

from hf_fngd.distributed.environment import rank_and_world, refuse_environment, refuse_replica, refuse_split_weight
from hf_fngd.distributed.exchange import Exchange, Measurement, sum_over_processes
from hf_fngd.distributed.sharded import is_sharded, local, part, sum_over_parts, whole

__all__ = [
    "Exchange",
    "Measurement",
    "is_sharded",
    "local",
    "part",
    "rank_and_world",
    "refuse_environment",
    "refuse_replica",
    "refuse_split_weight",
    "sum_over_parts",
    "sum_over_processes",
    "whole",
]
