"""What the policies have in common that solve for sample weights (Eq. 9): coefficient steps, rho, several processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from hf_fngd.distributed.environment import rank_and_world
from hf_fngd.distributed.exchange import Measurement, gather
from hf_fngd.weights.base import MicroBatchWeights, Samples, SharingPolicy, State
from hf_fngd.weights.solve import coefficients

# How much a coefficient step counts in the geometric means that shared steps use.
_RATE = 0.2


class StoredWeights(MicroBatchWeights):
    """A shared step: sample weights ``[L, N]`` of an earlier step; None means ones."""

    def __init__(self, size: int, rows: Tensor | None) -> None:
        super().__init__(size)
        self._rows = rows

    def weigh(self, layer: int, samples: Samples) -> Tensor | None:
        return None if self._rows is None else self._rows[layer]


class SolvedWeights(MicroBatchWeights):
    """A coefficient step: sample weights that this micro-batch's own Gram matrices tell.

    Attributes:
        offset: the micro-batch's number among those of the step, over all processes.
        w: sample weights ``[L, N]``, filled layer by layer; None before the first layer.
        rho: noise ratios ``[L]``; NaN where a layer measured none.
    """

    def __init__(self, size: int, offset: int, policy: SolvedPolicy) -> None:
        super().__init__(size)
        self.offset = offset
        self.w: Tensor | None = None
        self.rho: Tensor | None = None
        self._policy = policy

    def weigh(self, layer: int, samples: Samples) -> Tensor:
        w, rho = coefficients(samples.gram(self._policy.memory_budget), self._policy.damping)
        if self.w is None or self.rho is None:
            self.w = w.new_ones(self._policy.layers, self.size)
            self.rho = w.new_full((self._policy.layers,), torch.nan)
        self.w[layer], self.rho[layer] = w, rho
        return w


class SolvedPolicy(SharingPolicy):
    """A policy with coefficient steps.

    Attributes:
        place: number of the step's first micro-batch since the epoch began, over all processes.
        rho: noise ratios of the layers in the last step ``[L]``; NaN where none was ever measured.
        spread: ``mean(w^2)`` of the layers in the last step ``[L]``.
        averages: running geometric means of both, ``[2, L]``; None before the first measurement.
    """

    solves: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("damping", "memory_budget")

    def prepare(self, layers: int, *, damping: float, coefficient_steps: int | None, memory_budget: int) -> None:
        self.layers, self.damping, self.memory_budget = layers, damping, memory_budget
        self.place = 0
        self.averages: Tensor | None = None
        self._tell(None)

    @property
    def computes(self) -> bool:
        """Whether the optimizer step under way is a coefficient step (default: every one is)."""
        return True

    def begin(self, size: int, offset: int) -> MicroBatchWeights:
        if self.computes:
            return SolvedWeights(size, offset, self)
        return StoredWeights(size, self.lookup(size, self.place + offset))

    def lookup(self, size: int, place: int) -> Tensor | None:
        """Stored sample weights ``[L, N]`` for the micro-batch of that number in the epoch; None means ones."""
        return None

    def store(self, measurement: Measurement) -> None:
        """Store a coefficient step's sample weights (default: nothing is stored)."""

    def advance(self) -> None:
        """An optimizer step was done (default: nothing changes)."""

    def close(self, batches: Sequence[MicroBatchWeights], begun: int, like: Tensor) -> int:
        """See `SharingPolicy.close`. Communicates in a coefficient step, where there are several processes."""
        world = rank_and_world()[1]
        if not batches and not (begun and world > 1):
            return 0
        # With several processes the places are those of what began: the backward pass of one may reach no layer. With
        # one process a forward pass without a backward pass has no place.
        measured = [
            Measurement(self.place + (batch.offset if world > 1 else number), batch.w, batch.rho)
            for number, batch in enumerate(batches)
            if isinstance(batch, SolvedWeights) and batch.w is not None and batch.rho is not None
        ]
        if self.computes:
            measured = gather(measured, like.device)
        for measurement in measured:
            self.store(measurement)
        self.place += begun if world > 1 else len(batches)
        self._average(measured)
        self.advance()
        return super().close(batches, begun, like)

    def _average(self, measured: Sequence[Measurement]) -> None:
        """Of a step rho and the spread: measured in it, or else the running means."""
        if not measured:
            self._tell(self.averages)
            return
        fresh = torch.stack([torch.stack([m.rho, m.spread]) for m in measured]).nanmean(dim=0)
        average = fresh if self.averages is None else self.averages
        average = torch.where(average.isnan(), fresh, average)
        moved = torch.exp(torch.lerp(average.log(), fresh.log(), _RATE))
        self.averages = torch.where(fresh.isnan(), average, moved)
        self._tell(torch.where(fresh.isnan(), self.averages, fresh))

    def _tell(self, ratios: Tensor | None) -> None:
        self.rho, spread = (torch.full((2, self.layers), torch.nan) if ratios is None else ratios).unbind()
        self.spread = spread.nan_to_num(nan=1.0)

    def end_epoch(self) -> None:
        self.place = 0

    def diagnostics(self) -> dict[str, float]:
        """``rho``, geometric mean over the layers, once it was measured, and ``weight_spread``.

        The latter is the standard deviation of the sample weights over their mean, root mean square over the layers.
        """
        known = self.rho[~self.rho.isnan()]
        measured = {"rho": float(known.log().mean().exp())} if known.numel() else {}
        return measured | {"weight_spread": float((self.spread.mean() - 1).clamp(min=0).sqrt())}

    def state_dict(self) -> State:
        return {"place": self.place, "averages": self.averages}

    def load_state_dict(self, state: State) -> None:
        averages = state["averages"]
        if averages is not None and averages.shape[1] != self.layers:
            raise ValueError(f"the state is for {averages.shape[1]} layers, this model has {self.layers} attached ones")
        self.place = state["place"]
        self.averages = None if averages is None else averages.clone()
        self._tell(self.averages)
