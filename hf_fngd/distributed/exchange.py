"""Several processes: what each measured in a step, brought to all of them.

Every process weighs the samples of its own micro-batch, and the gradients are averaged as ever (Sec. IV-D: weigh
locally, then aggregate). Coefficients are exchanged once, in the optimizer step, and each process then stores all of
them in the same order. So R processes do exactly what one does that accumulates R micro-batches, and what they store
agrees bit for bit. A shared step exchanges nothing, but for the mean norms of ``sharing="clipped"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hf_fngd.distributed.environment import rank_and_world


@dataclass(frozen=True)
class Measurement:
    """The coefficients that one micro-batch's backward pass computed.

    Attributes:
        place: number of the micro-batch since the epoch began, over all processes.
        w: sample weights ``[L, N]``.
        rho: noise ratios ``[L]``; NaN where a layer's coefficients were unusable.
    """

    place: int
    w: Tensor
    rho: Tensor

    @property
    def valid(self) -> Tensor:
        """Which layers' coefficients are usable, ``[L]``."""
        return ~self.rho.isnan()

    @property
    def spread(self) -> Tensor:
        """``mean(w^2)`` of the layers, ``[L]``, NaN where unusable."""
        return torch.where(self.valid, self.w.square().mean(dim=1), torch.nan)


def gather(own: Sequence[Measurement], device: torch.device) -> list[Measurement]:
    """All processes' measurements, by place. A collective where there are several processes: each has to call it."""
    _, world = rank_and_world()
    if world == 1:
        return list(own)
    received: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in range(world)]
    dist.all_gather_object(received, [(m.place, m.w.cpu(), m.rho.cpu()) for m in own])
    found = [Measurement(place, w.to(device), rho.to(device)) for message in received for place, w, rho in message]
    return sorted(found, key=lambda m: m.place)


def sum_over_processes(own: Tensor) -> Tensor:
    """The sums ``[K]`` of all processes' numbers, in the order of their ranks, which makes them alike bit for bit.

    A collective where there are several processes: each has to call it.
    """
    _, world = rank_and_world()
    if world == 1:
        return own
    received = own.new_empty(world, len(own))
    dist.all_gather(list(received.unbind()), own)
    return received.sum(dim=0)
