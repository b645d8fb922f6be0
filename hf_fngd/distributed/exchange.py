"""Several processes: what each measured in a coefficient step, brought to all of them.

Every process weighs the samples of its own micro-batch, and the gradients are averaged as ever (Sec. IV-D: weigh
locally, then aggregate). The coefficients are exchanged once, in the optimizer step, and each process then stores all
of them in the same order. So R processes do exactly what one does that accumulates R micro-batches, and store, rho and
phase agree bit for bit. A shared step exchanges nothing, but for the mean norms of ``sharing="clipped"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hf_fngd.distributed.environment import rank_and_world

_HEADER = 2  # of a measurement: size and place
_COUNTS = 2  # of a message: number of measurements, largest size


@dataclass(frozen=True)
class Measurement:
    """The coefficients that one micro-batch's backward pass computed.

    Attributes:
        size: number of samples N.
        place: number of the micro-batch since the epoch began, over all processes.
        w: sample weights ``[L, N]``.
        rho: noise ratios ``[L]``; NaN where a layer's coefficients were unusable.
    """

    size: int
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


def sum_over_processes(own: Tensor) -> Tensor:
    """The sums ``[K]`` of all processes' numbers, in the order of their ranks, which makes them alike bit for bit.

    A collective where there are several processes, each of which has to call it.
    """
    _, world = rank_and_world()
    if world == 1:
        return own
    received = own.new_empty(world, len(own))
    dist.all_gather(list(received.unbind()), own)
    return received.sum(dim=0)


class Exchange:
    """The one collective of a coefficient step.

    A message has room for as many measurements, and as large ones, as any process ever had; its first two numbers say
    how many there are. Where they exceed the room, which all processes see alike, all send again with more of it: in
    the first coefficient step, and where batches grow.
    """

    def __init__(self) -> None:
        self._rows, self._width = 0, 0

    def gather(self, own: Sequence[Measurement], like: Tensor) -> list[Measurement]:
        """All processes' measurements, by place; every process has to call it.

        Args:
            own: this process's measurements.
            like: a ``[L]`` tensor of the dtype and device that the result is to have.
        """
        while True:
            received = self._all_gather(self._pack(own, like))
            counts = received[:, :_COUNTS].tolist()
            rows, width = (int(max(column)) for column in zip(*counts, strict=True))
            if rows <= self._rows and width <= self._width:
                break
            self._rows, self._width = max(rows, self._rows), max(width, self._width)
        measurements = [
            m
            for message, (rows, _) in zip(received, counts, strict=True)
            for m in self._unpack(message, int(rows), like)
        ]
        return sorted(measurements, key=lambda m: m.place)

    def _pack(self, own: Sequence[Measurement], like: Tensor) -> Tensor:
        layers = len(like)
        # float64 holds sample weights, noise ratios and places exactly.
        message = like.new_zeros(_COUNTS + self._rows * self._columns(layers), dtype=torch.float64)
        largest = max((m.size for m in own), default=0)
        message[0], message[1] = len(own), largest
        if len(own) > self._rows or largest > self._width:
            return message
        for row, m in zip(self._measurements(message, layers), own, strict=False):
            n = m.size
            row[0], row[1] = n, m.place
            row[_HEADER : _HEADER + layers] = m.rho
            row[_HEADER + layers :].view(layers, self._width)[:, :n] = m.w
        return message

    def _unpack(self, message: Tensor, rows: int, like: Tensor) -> list[Measurement]:
        layers = len(like)
        measurements = []
        filled = self._measurements(message, layers)[:rows]
        for row, header in zip(filled, filled[:, :_HEADER].tolist(), strict=True):  # waits for the device once
            n, place = (int(number) for number in header)
            table = row[_HEADER + layers :].view(layers, self._width)[:, :n]
            rho = row[_HEADER : _HEADER + layers].to(like.dtype)
            measurements.append(Measurement(n, place, table.to(like.dtype), rho))
        return measurements

    def _measurements(self, message: Tensor, layers: int) -> Tensor:
        return message[_COUNTS:].view(self._rows, self._columns(layers))

    def _columns(self, layers: int) -> int:
        return _HEADER + layers + layers * self._width

    def _all_gather(self, message: Tensor) -> Tensor:
        _, world = rank_and_world()
        received = message.new_empty(world, len(message))
        dist.all_gather(list(received.unbind()), message)
        return received
