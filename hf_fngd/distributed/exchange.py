"""Several processes: each gets what all of them measured in a step.

Every process weighs its own samples, and the gradients are averaged as usual (Sec. IV-D). All processes store all
measurements in the same order: bit for bit what one process would store that accumulates as many micro-batches.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Measurement:
    """The coefficients that one micro-batch's backward pass computed."""

    place: int  # the micro-batch's number since the epoch began, over all processes
    w: Tensor  # sample weights ``[L, N]``
    rho: Tensor  # noise ratios ``[L]``; NaN where a layer's coefficients were unusable

    @property
    def spread(self) -> Tensor:
        """``mean(w^2)`` of the layers, ``[L]``, NaN where unusable."""
        return torch.where(self.rho.isnan(), torch.nan, self.w.square().mean(dim=1))


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of data-parallel processes, 0 and 1 without torch.distributed."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def gather(own: Sequence[Measurement], device: torch.device) -> list[Measurement]:
    """All processes' measurements, by place. A collective: each process has to call it."""
    world = rank_and_world()[1]
    if world == 1:
        return list(own)
    received: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in range(world)]
    with with_cause():
        dist.all_gather_object(received, [(m.place, m.w.cpu(), m.rho.cpu()) for m in own])
    found = [Measurement(place, w.to(device), rho.to(device)) for message in received for place, w, rho in message]
    return sorted(found, key=lambda m: m.place)


def sum_over_processes(own: Tensor) -> Tensor:
    """Sums ``[K]`` over all processes in the order of their ranks, so that they agree bit for bit. A collective."""
    world = rank_and_world()[1]
    if world == 1:
        return own
    received = own.new_empty(world, len(own))
    with with_cause():
        dist.all_gather(list(received.unbind()), own)
    return received.sum(dim=0)


@contextmanager
def with_cause() -> Iterator[None]:
    """Add the likely cause to an exchange's error. The process group's timeout ends one that others never join."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"FNGD's exchange between the processes failed in process {rank_and_world()[0]}: another one has ended, or "
            "makes another number of optimizer steps, which have to be as many in all of them. Give them batches of "
            "equal number (drop_last, a DistributedSampler), or train within "
            "torch.distributed.algorithms.join.Join([model, optimizer])"
        ) from error
