"""FSDP2: parameters, gradients and state of which each process holds a part."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def is_sharded(x: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return isinstance(x, DTensor)


def local(x: Tensor) -> Tensor:
    """The part of a DTensor that this process holds; any other tensor as it is."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]


def whole(part: Tensor, like: Tensor) -> Tensor:
    """The tensor of which ``part`` is this process's part, where ``like`` is sharded. A collective."""
    if not is_sharded(like):
        return part
    assert isinstance(like, DTensor)
    sharded = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return sharded.full_tensor()


def part(x: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process holds, where ``like`` is sharded; the inverse of `whole`."""
    if not is_sharded(like):
        return x
    assert isinstance(like, DTensor)
    everywhere = DTensor.from_local(x, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=like.placements).to_local()


def replicas(x: Tensor) -> int:
    """How many processes hold each entry of a sharded tensor."""
    assert isinstance(x, DTensor)
    sizes = [x.device_mesh.size(i) for i, placement in enumerate(x.placements) if placement.is_replicate()]
    return math.prod(sizes)


def sum_over_parts(totals: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Sums over this process's parts to sums over whole tensors, ``[P]``: one collective if any is sharded."""
    shards = [i for i, p in enumerate(params) if is_sharded(p)]
    if not shards:
        return totals
    places = torch.tensor(shards, device=totals.device)
    weights = torch.tensor([1 / replicas(params[i]) for i in shards], dtype=totals.dtype, device=totals.device)
    partial = totals[places] * weights
    dist.all_reduce(partial)
    return totals.index_copy(0, places, partial)
