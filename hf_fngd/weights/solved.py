"""What policies that solve for sample weights (Eq. 9) have in common; and ``never``, which does so in every step."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from hf_fngd.distributed.exchange import Measurement, gather, rank_and_world
from hf_fngd.weights.base import MicroBatchWeights, Samples, SharingPolicy, State, register_policy
from hf_fngd.weights.solve import coefficients


class SolvedWeights(MicroBatchWeights):
    """Sample weights w ``[L, N]`` and noise ratios rho ``[L]``, solved from a micro-batch's own Gram matrices.

    Both are None before the first layer, then filled layer by layer. A layer that measured nothing has 1 and NaN.
    """

    def __init__(self, size: int, offset: int, policy: "SolvedPolicy") -> None:
        super().__init__(size)
        self.offset, self._policy = offset, policy
        self.w: Tensor | None = None
        self.rho: Tensor | None = None

    def weigh(self, layer: int, samples: Samples) -> Tensor:
        w, rho = coefficients(samples.gram(self._policy.memory_budget), self._policy.damping)
        if self.w is None or self.rho is None:
            self.w = w.new_ones(self._policy.layers, self.size)
            self.rho = w.new_full((self._policy.layers,), torch.nan)
        self.w[layer], self.rho[layer] = w, rho
        return w


class SolvedPolicy(SharingPolicy):
    """A policy with coefficient steps."""

    solves = True
    reads: ClassVar[tuple[str, ...]] = ("damping", "memory_budget")
    rho: Tensor  # noise ratios in the last step ``[L]``; NaN where none was ever measured
    spread: Tensor  # ``mean(w^2)`` in the last step ``[L]``

    def prepare(self, layers: int, *, damping: float, coefficient_steps: int | None, memory_budget: int) -> None:
        self.layers, self.damping, self.memory_budget = layers, damping, memory_budget
        self.place = 0  # how many micro-batches of the epoch, in all processes, came before this step
        self.averages: Tensor | None = None  # running geometric means of rho and spread ``[2, L]``, once measured
        self._tell(None)

    @property
    def computes(self) -> bool:
        """Whether the current optimizer step is a coefficient step (default: every one is)."""
        return True

    @property
    def exchanges(self) -> bool:
        return self.computes

    def begin(self, size: int, offset: int) -> MicroBatchWeights:
        return SolvedWeights(size, offset, self)

    def advance(self, measured: Sequence[Measurement]) -> None:
        """Take in what all processes measured in an optimizer step (default: nothing changes)."""

    def close(self, batches: Sequence[MicroBatchWeights], begun: int, like: Tensor) -> int:
        """See `SharingPolicy.close`. Communicates in a coefficient step, where there are several processes."""
        several = rank_and_world()[1] > 1
        if not batches and not (begun and several):
            return 0
        # With several processes every forward pass that began has a place, since in one process backward may reach no
        # layer. With one process only complete micro-batches have a place.
        measured = [
            Measurement(self.place + (batch.offset if several else number), batch.w, batch.rho)
            for number, batch in enumerate(batches)
            if isinstance(batch, SolvedWeights) and batch.w is not None and batch.rho is not None
        ]
        if self.computes:
            measured = gather(measured, like.device)
        self._average(measured)
        self.place += begun if several else len(batches)
        self.advance(measured)
        return super().close(batches, begun, like)

    def _average(self, measured: Sequence[Measurement]) -> None:
        """Rho and the spread of this step: as measured, or else the running means (a new one counts a fifth)."""
        ratios = self.averages
        if measured:
            fresh = torch.stack([torch.stack([m.rho, m.spread]) for m in measured]).nanmean(dim=0)
            before = fresh if ratios is None else torch.where(ratios.isnan(), fresh, ratios)
            moved = torch.exp(torch.lerp(before.log(), fresh.log(), 0.2))
            self.averages = torch.where(fresh.isnan(), before, moved)
            ratios = torch.where(fresh.isnan(), before, fresh)
        self._tell(ratios)

    def _tell(self, ratios: Tensor | None) -> None:
        self.rho, spread = (torch.full((2, self.layers), torch.nan) if ratios is None else ratios).unbind()
        self.spread = spread.nan_to_num(nan=1.0)

    def end_epoch(self) -> None:
        self.place = 0

    def diagnostics(self) -> dict[str, float]:
        """``rho`` (geometric mean over the layers, once measured) and ``weight_spread`` (root mean square)."""
        known = self.rho[~self.rho.isnan()]
        measured = {"rho": float(known.log().mean().exp())} if known.numel() else {}
        spread = self.spread[~self.rho.isnan()] if known.numel() else self.spread[:1]
        return measured | {"weight_spread": float((spread.mean() - 1).clamp(min=0).sqrt())}

    def state_dict(self) -> State:
        return {"place": self.place, "averages": self.averages}

    def load_state_dict(self, state: State) -> None:
        averages = state["averages"]
        if averages is not None and averages.shape[1] != self.layers:
            raise ValueError(f"the state is for {averages.shape[1]} layers, this model has {self.layers} attached ones")
        self.place = state["place"]
        self.averages = None if averages is None else averages.clone()
        self._tell(self.averages)


@register_policy
class NeverSharing(SolvedPolicy):
    """Solves Eq. 9 anew for every micro-batch."""

    name = "never"
