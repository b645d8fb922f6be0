"""FSDP2: each process holds a part of a parameter, of its gradient and of its state."""

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
    return x.to_local() if isinstance(x, DTensor) else x


def whole(part: Tensor, like: Tensor) -> Tensor:
    """The whole tensor, from this process's ``part`` of it, if ``like`` is sharded; else ``part``. A collective."""
    if not isinstance(like, DTensor):
        return part
    sharded = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return sharded.full_tensor()


def part(x: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, if ``like`` is sharded; else the tensor. The inverse of `whole`."""
    if not isinstance(like, DTensor):
        return x
    everywhere = DTensor.from_local(x, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=like.placements).to_local()


def is_split_by_first(x: Tensor) -> bool:
    """Whether each process holds whole entries ``x[i]`` of a tensor: some of them, or all."""
    return not isinstance(x, DTensor) or all(one.is_replicate() or one.is_shard(0) for one in x.placements)


def holds_blocks(x: Tensor, size: int, matrices: int = 1) -> bool:
    """Whether each process holds equally many whole blocks of ``size`` rows, of the matrices stacked in ``x``."""
    if not isinstance(x, DTensor):
        return True
    parts = math.prod(x.device_mesh.size(dim) for dim, one in enumerate(x.placements) if not one.is_replicate())
    rows = x.shape[0]
    return is_split_by_first(x) and rows % (parts * size) == 0 and rows // matrices % size == 0


def sum_over_parts(totals: Tensor, params: Sequence[Tensor]) -> Tensor:
    """From sums over this process's parts to sums over whole tensors, ``[P]``. A collective if any is sharded."""
    shards = {place: p for place, p in enumerate(params) if isinstance(p, DTensor)}
    if not shards:
        return totals
    places = torch.tensor(list(shards), device=totals.device)
    shares = [1 / _replicas(p) for p in shards.values()]
    partial = totals[places] * torch.tensor(shares, dtype=totals.dtype, device=totals.device)
    dist.all_reduce(partial)
    return totals.index_copy(0, places, partial)


def _replicas(x: DTensor) -> int:
    """How many processes hold each entry."""
    return math.prod(x.device_mesh.size(i) for i, placement in enumerate(x.placements) if placement.is_replicate())
