"""``replay``: the paper's rule, the coefficients of the first epoch used again in order (Algorithm 1)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from hf_fngd.sharing.base import BatchInfo, SharingPolicy, State, check_layers, register_policy, repeat_to


@register_policy
class ReplaySharing(SharingPolicy):
    """One row a micro-batch of the first epoch, ``[capacity, L, N]``, replayed cyclically.

    The store is allocated once, at the first coefficient step, for as many rows as the phase may have or the
    memory budget allows; later rows of a longer phase overwrite the oldest.
    """

    name: ClassVar[str] = "replay"

    def __init__(self) -> None:
        self.store: Tensor | None = None
        self.recorded = 0

    def prepare(self, layers: int, coefficient_steps: int, memory_budget: int) -> None:
        """See `SharingPolicy.prepare`."""
        super().prepare(layers, coefficient_steps, memory_budget)
        self.coefficient_steps = coefficient_steps
        self.memory_budget = memory_budget

    def lookup(self, batch: BatchInfo) -> Tensor | None:
        """See `SharingPolicy.lookup`."""
        if self.store is None or self.recorded == 0:
            return None
        return repeat_to(self.store[batch.place % self.recorded], batch.size)

    def commit(self, w: Tensor, valid: Tensor, batch: BatchInfo) -> None:
        """See `SharingPolicy.commit`. A refresh overwrites the row of its place in the epoch."""
        if self.store is None:
            self.store = w.new_empty(self._capacity(w), *w.shape)
        elif self.store.shape[2] < batch.size:  # the first batch was a short one
            self._restore(repeat_to(self.store[: self.recorded], batch.size))
        place = batch.place % self.store.shape[0]
        if place >= self.recorded:
            self.store[self.recorded : place + 1] = 1
            self.recorded = place + 1
        row = self.store[place]
        row.copy_(repeat_to(w, row.shape[1]).where(valid[:, None], row))

    def _capacity(self, w: Tensor) -> int:
        return max(1, min(self.coefficient_steps, self.memory_budget // (w.numel() * w.element_size())))

    def _restore(self, rows: Tensor) -> None:
        self.store = rows.new_empty(self._capacity(rows[:1]), *rows.shape[1:])
        self.recorded = min(len(rows), len(self.store))
        self.store[: self.recorded] = rows[: self.recorded]

    def state_dict(self) -> State:
        """See `SharingPolicy.state_dict`; rows never recorded are left out."""
        if self.store is None:
            return {}
        # A view would be saved with its whole storage, rows never written included.
        return {"rows": self.store[: self.recorded].clone()}

    def load_state_dict(self, state: State) -> None:
        """See `SharingPolicy.load_state_dict`."""
        rows = state.get("rows")
        if rows is None:
            self.store, self.recorded = None, 0
        else:
            check_layers(rows.shape[1], self.layers)
            self._restore(rows)
