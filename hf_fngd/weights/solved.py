"""What the policies have in common that solve for sample weights (Eq. 9): coefficient steps, rho, several processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from hf_fngd.distributed import Exchange, Measurement, rank_and_world
from hf_fngd.weights.base import MicroBatchWeights, Samples, SharingPolicy, State
from hf_fngd.weights.ratios import Ratios
from hf_fngd.weights.solve import coefficients


class StoredWeights(MicroBatchWeights):
    """A shared step: sample weights that an earlier step solved for.

    Attributes:
        rows: ``[L, N]``; None where nothing is stored, which means ones.
    """

    def __init__(self, size: int, rows: Tensor | None) -> None:
        super().__init__(size)
        self.rows = rows

    def weigh(self, layer: int, samples: Samples) -> Tensor | None:
        """See `MicroBatchWeights.weigh`."""
        return None if self.rows is None else self.rows[layer]


class SolvedWeights(MicroBatchWeights):
    """A coefficient step: sample weights that this micro-batch's own Gram matrices tell.

    Attributes:
        offset: the micro-batch's number among those of the step, over all processes.
        w: sample weights ``[L, N]``, filled layer by layer; None before the first layer.
        rho: noise ratios ``[L]``; NaN where a layer measured none.
    """

    def __init__(self, size: int, offset: int, layers: int, damping: float, memory_budget: int) -> None:
        super().__init__(size)
        self.offset = offset
        self.w: Tensor | None = None
        self.rho: Tensor | None = None
        self._layers, self._damping, self._memory_budget = layers, damping, memory_budget

    def weigh(self, layer: int, samples: Samples) -> Tensor:
        """See `MicroBatchWeights.weigh`."""
        w, rho = coefficients(samples.gram(self._memory_budget), self._damping)
        if self.w is None or self.rho is None:
            self.w = w.new_ones(self._layers, self.size)
            self.rho = w.new_full((self._layers,), torch.nan)
        self.w[layer], self.rho[layer] = w, rho
        return w


class SolvedPolicy(SharingPolicy):
    """A policy with coefficient steps.

    Attributes:
        computes: whether the optimizer step under way is a coefficient step.
        place: number of the step's first micro-batch since the epoch began, over all processes.
        ratios: the layers' noise ratios, and the spreads of their sample weights.
    """

    solves: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("damping", "memory_budget")

    def prepare(self, layers: int, *, damping: float, coefficient_steps: int | None, memory_budget: int) -> None:
        """See `SharingPolicy.prepare`."""
        super().prepare(layers, damping=damping, coefficient_steps=coefficient_steps, memory_budget=memory_budget)
        self.damping, self.memory_budget = damping, memory_budget
        self.place, self.ratios, self._exchange = 0, Ratios(layers), Exchange()

    @property
    def computes(self) -> bool:
        """Whether the optimizer step under way is a coefficient step (default: every one is)."""
        return True

    @property
    def rho(self) -> Tensor:
        """Noise ratios of the layers in the last step ``[L]``; NaN where none was ever measured."""
        return self.ratios.rho

    @property
    def spread(self) -> Tensor:
        """``mean(w^2)`` of the layers in the last step ``[L]``."""
        return self.ratios.spread

    def begin(self, size: int, offset: int) -> MicroBatchWeights:
        """See `SharingPolicy.begin`."""
        if self.computes:
            return SolvedWeights(size, offset, self.layers, self.damping, self.memory_budget)
        return StoredWeights(size, self.lookup(size, self.place + offset))

    def lookup(self, size: int, place: int) -> Tensor | None:
        """Stored sample weights ``[L, N]`` for a shared step; None where there are none, which means ones.

        Args:
            size: N.
            place: number of the micro-batch since the epoch began.
        """
        return None

    def store(self, measurement: Measurement) -> None:
        """Store a coefficient step's sample weights (default: nothing is stored)."""

    def advance(self) -> None:
        """An optimizer step was done (default: nothing changes)."""

    def close(self, batches: Sequence[MicroBatchWeights], begun: int, like: Tensor) -> int:
        """See `SharingPolicy.close`. Communicates once in a coefficient step, where there are several processes."""
        _, world = rank_and_world()
        if not batches and not (begun and world > 1):
            return 0
        # With several processes the places are those of what began: the backward pass of one may reach no layer. With
        # one process a forward pass without a backward pass has no place.
        own = [
            Measurement(batch.size, self.place + (batch.offset if world > 1 else number), batch.w, batch.rho)
            for number, batch in enumerate(batches)
            if isinstance(batch, SolvedWeights) and batch.w is not None and batch.rho is not None
        ]
        several = self.computes and world > 1
        measurements = self._exchange.gather(own, like.new_empty(self.layers)) if several else own
        for measurement in measurements:
            self.store(measurement)
        self.place += begun if world > 1 else len(batches)
        self.ratios.update(measurements)
        self.advance()
        return super().close(batches, begun, like)

    def end_epoch(self) -> None:
        """See `SharingPolicy.end_epoch`."""
        self.place = 0

    def diagnostics(self) -> dict[str, float]:
        """``rho`` (geometric mean over the layers) and ``weight_spread`` (root mean square over the layers)."""
        return self.ratios.summary()

    def state_dict(self) -> State:
        """See `SharingPolicy.state_dict`."""
        return {"place": self.place, "averages": self.ratios.averages}

    def load_state_dict(self, state: State) -> None:
        """See `SharingPolicy.load_state_dict`."""
        averages = state["averages"]
        if averages is not None and averages.shape[1] != self.layers:
            raise ValueError(f"the state is for {averages.shape[1]} layers, this model has {self.layers} attached ones")
        self.place = state["place"]
        self.ratios.load(None if averages is None else averages.clone())
