"""Several processes: what each measured in a step, brought to all of them.

Every process weighs its own samples, and the gradients are averaged as ever (Sec. IV-D). All processes store what all
measured, in the same order: bit for bit what one process stores that accumulates as many micro-batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hf_fngd.distributed.environment import rank_and_world


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


def gather(own: Sequence[Measurement], device: torch.device) -> list[Measurement]:
    """All processes' measurements, by place. A collective: each process has to call it."""
    world = rank_and_world()[1]
    if world == 1:
        return list(own)
    received: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in range(world)]
    dist.all_gather_object(received, [(m.place, m.w.cpu(), m.rho.cpu()) for m in own])
    found = [Measurement(place, w.to(device), rho.to(device)) for message in received for place, w, rho in message]
    return sorted(found, key=lambda m: m.place)


def sum_over_processes(own: Tensor) -> Tensor:
    """Sums ``[K]`` over all processes in the order of their ranks, so that they agree bit for bit. A collective."""
    world = rank_and_world()[1]
    if world == 1:
        return own
    received = own.new_empty(world, len(own))
    dist.all_gather(list(received.unbind()), own)
    return received.sum(dim=0)
