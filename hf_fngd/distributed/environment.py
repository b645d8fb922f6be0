"""Environments in which FNGD would train wrongly: it refuses them early, and names what to use instead."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from hf_fngd.distributed.sharded import is_sharded

_DATA_PARALLEL = "use accelerate launch with DistributedDataParallel (multi_gpu) or FSDP2 instead"


def refuse_environment(model: nn.Module) -> None:
    """Refuse what splits samples, weights or the optimizer's step in ways that the sample weights cannot follow.

    Args:
        model: the model to attach to, or that was attached to and has meanwhile been prepared.

    Raises:
        RuntimeError: nn.DataParallel, FSDP1, DeepSpeed, Megatron-LM, or tensor, context or sequence parallelism.
    """
    for module in model.modules():
        refuse_replica(module)
        if isinstance(module, nn.DataParallel):
            _refuse_data_parallel()
        if type(module).__name__ == "FullyShardedDataParallel":
            _refuse_fsdp1()
    if (getattr(model, "_tp_size", None) or 1) > 1:
        _refuse_split("tensor parallelism", "a layer's weight")
    _refuse_accelerate()


def refuse_replica(module: nn.Module) -> None:
    """Refuse a module that nn.DataParallel copied for one device.

    Raises:
        RuntimeError: it is a replica.
    """
    if getattr(module, "_is_replica", False):
        _refuse_data_parallel()


def refuse_split_weight(weight: Tensor) -> None:
    """Refuse a layer whose weight is a shard when its forward runs (under FSDP2 it is whole by then).

    Raises:
        RuntimeError: it is a DTensor.
    """
    if is_sharded(weight):
        _refuse_split("tensor parallelism", "a layer's weight")


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of data-parallel processes, 0 and 1 without torch.distributed."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _refuse_accelerate() -> None:
    # Looked up, not imported: a plain PyTorch loop has no use for accelerate.
    module = sys.modules.get("accelerate.state")
    state: dict[str, Any] = {} if module is None else module.AcceleratorState._shared_state
    kind = getattr(state.get("distributed_type"), "name", "")
    if kind in ("DEEPSPEED", "MEGATRON_LM"):
        title = "DeepSpeed" if kind == "DEEPSPEED" else "Megatron-LM"
        raise RuntimeError(
            f"FNGD does not run under {title}, which takes gradients and the optimizer's step into its own hands: "
            "use FSDP2 (fsdp_config with version 2, and FNGDFactory) to shard the model, or DistributedDataParallel"
        )
    if getattr(state.get("fsdp_plugin"), "fsdp_version", 2) == 1:
        _refuse_fsdp1()
    parallelism = state.get("parallelism_config")
    for short, title, what in (
        ("tp", "tensor parallelism", "a layer's weight"),
        ("cp", "context parallelism", "a sample's positions"),
        ("sp", "sequence parallelism", "a sample's positions"),
    ):
        if (getattr(parallelism, f"{short}_size", None) or 1) > 1:
            _refuse_split(title, what)


def _refuse_data_parallel() -> None:
    raise RuntimeError(
        "FNGD does not run under nn.DataParallel, whose replicas each see a part of the batch for one backward pass: "
        f"{_DATA_PARALLEL} (or make one device visible with CUDA_VISIBLE_DEVICES)"
    )


def _refuse_fsdp1() -> None:
    raise RuntimeError(
        "FNGD does not run under FSDP version 1, which flattens the weights of several layers into one parameter: use "
        "version 2 (fsdp_version: 2 in the Accelerate config or fsdp_config, torch's fully_shard)"
    )


def _refuse_split(title: str, what: str) -> None:
    raise RuntimeError(
        f"FNGD does not run under {title}, where no process sees {what} whole: the per-sample gradients would be "
        f"partial; {_DATA_PARALLEL}"
    )
