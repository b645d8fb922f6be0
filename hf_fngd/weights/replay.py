"""``replay``: the paper's rule. The sample weights of the first epoch are used again in order (Algorithm 1)."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_fngd.distributed.exchange import Measurement
from hf_fngd.weights.base import MicroBatchWeights, State, StoredWeights, register_policy
from hf_fngd.weights.solved import SolvedPolicy

_FIRST_CAPACITY = 1024


@register_policy
class ReplaySharing(SolvedPolicy):
    """One row of sample weights a micro-batch of the first epoch, ``[capacity, L, N]``, replayed cyclically.

    The store starts with room for at most 1024 rows, and doubles when it is full, within the memory budget. Beyond the
    budget new rows overwrite the oldest, with a warning. A batch of another size takes the first N weights of a row,
    from the start again if they run out, brought to mean 1.
    """

    name = "replay"
    reads = ("damping", "coefficient_steps", "memory_budget")

    def prepare(self, layers: int, *, damping: float, coefficient_steps: int | None, memory_budget: int) -> None:
        super().prepare(layers, damping=damping, coefficient_steps=coefficient_steps, memory_budget=memory_budget)
        self.coefficient_steps = coefficient_steps
        self.rows: Tensor | None = None  # the store
        self.recorded, self._full = 0, False  # how many rows are written, and whether the store cannot grow
        self.steps: int = 0  # optimizer steps done
        self.shared_since: int | None = None  # the step at which the first epoch, or its cap, ended

    @property
    def computes(self) -> bool:
        return self.shared_since is None

    @property
    def awaits_epoch(self) -> bool:
        return self.computes

    def begin(self, size: int, offset: int) -> MicroBatchWeights:
        if self.computes:
            return super().begin(size, offset)
        if self.rows is None or self.recorded == 0:
            return StoredWeights(size)
        return StoredWeights(size, with_mean_one(cycle_to(self.rows[(self.place + offset) % self.recorded], size)))

    def advance(self, measured: Sequence[Measurement]) -> None:
        for measurement in measured:
            self._store(measurement)
        self.steps += 1
        if self.computes and self.steps == self.coefficient_steps:
            self.end_epoch()

    def _store(self, measurement: Measurement) -> None:
        w, place = measurement.w, measurement.place
        if self.rows is None:
            self.rows = self._allocate(w[None][:0], min(self.coefficient_steps or _FIRST_CAPACITY, _FIRST_CAPACITY))
        rows = self.rows[: self.recorded]
        if w.shape[1] > self.rows.shape[2]:  # the first batch was a short one
            self.rows = self._allocate(cycle_to(rows, w.shape[1]), len(self.rows))
            rows = self.rows[: self.recorded]
        if place >= len(self.rows) and not self._full:
            self.rows = self._allocate(rows, max(2 * len(self.rows), place + 1))
            self._full = place >= len(self.rows)
            if self._full:
                warnings.warn(
                    f'sharing="replay" keeps the sample weights of {len(self.rows)} micro-batches, of more in an '
                    f"epoch, and overwrites the oldest: raise memory_budget, now {self.memory_budget} bytes",
                    stacklevel=2,
                )
        place %= len(self.rows)
        self.recorded = max(self.recorded, place + 1)
        row = self.rows[place]
        # Not brought to mean 1 here, so that a short batch gets exactly its own sample weights back.
        row.copy_(cycle_to(w, row.shape[1]).where(~measurement.rho.isnan()[:, None], row))

    def _allocate(self, rows: Tensor, capacity: int) -> Tensor:
        """A store that begins with the given rows and has room for ``capacity``, as far as the budget goes."""
        affordable = max(1, self.memory_budget // (rows.shape[1:].numel() * rows.element_size()))
        store = rows.new_ones(min(capacity, affordable), *rows.shape[1:])
        self.recorded = min(len(rows), len(store))
        store[: self.recorded] = rows[: self.recorded]
        return store

    def end_epoch(self) -> None:
        """See `SharingPolicy.end_epoch`. The first epoch ends if it has seen a step."""
        super().end_epoch()
        if self.computes and self.steps > 0:
            self.shared_since = self.steps

    def diagnostics(self) -> dict[str, float]:
        """``phase`` (0: the first epoch, 1: sharing), beside what `SolvedPolicy.diagnostics` returns."""
        return {"phase": float(not self.computes), **super().diagnostics()}

    def state_dict(self) -> State:
        # Cloned: a view would be saved with its whole storage, unwritten rows included.
        rows = None if self.rows is None else self.rows[: self.recorded].clone()
        return {**super().state_dict(), "steps": self.steps, "shared_since": self.shared_since, "rows": rows}

    def load_state_dict(self, state: State) -> None:
        rows = state["rows"]
        if rows is not None and rows.shape[1] != self.layers:
            raise ValueError(f"the state is for {rows.shape[1]} layers, this model has {self.layers} attached ones")
        super().load_state_dict(state)
        self.steps, self.shared_since = state["steps"], state["shared_since"]
        self.rows, self.recorded, self._full = None, 0, False
        if rows is not None:
            self.rows = self._allocate(rows, max(len(rows), min(self.coefficient_steps or 0, _FIRST_CAPACITY)))


def with_mean_one(w: Tensor) -> Tensor:
    """Bring the sample weights of each layer ``[..., N]`` to mean 1: by a factor of at most 2, then by a shift.

    At low damping some weights are negative, so the mean of a few can be near 0 and must not be divided by.
    """
    mean = w.mean(dim=-1, keepdim=True)
    divisor = mean.clamp(min=0.5)
    return w / divisor + (1 - mean / divisor)


def cycle_to(w: Tensor, size: int) -> Tensor:
    """The first ``size`` of the sample weights ``[..., M]``, from the start again if they run out."""
    return w if w.shape[-1] == size else w[..., torch.arange(size, device=w.device) % w.shape[-1]]
