"""``replay``: the paper's rule, the coefficients of the first epoch used again in order (Algorithm 1)."""

from __future__ import annotations

import warnings
from typing import ClassVar

from torch import Tensor

from hf_fngd.sharing.base import BatchInfo, SharingPolicy, State, check_layers, cycle_to, register_policy, with_mean_one

_FIRST_CAPACITY = 1024


@register_policy
class ReplaySharing(SharingPolicy):
    """One row a micro-batch of the first epoch, ``[capacity, L, N]``, replayed cyclically.

    The store has room for the rows of the phase, at first for 1024 of them at most, and doubles where there are more
    (gradient accumulation has several a step), within the memory budget; rows that come after that overwrite the
    oldest, with a warning.
    """

    name: ClassVar[str] = "replay"

    store: Tensor | None = None
    recorded: int = 0

    def prepare(self, layers: int, coefficient_steps: int, memory_budget: int, rest: int = 0) -> None:
        """See `SharingPolicy.prepare`."""
        super().prepare(layers, coefficient_steps, memory_budget, rest)
        self.coefficient_steps = coefficient_steps
        self.memory_budget = memory_budget
        self.store, self.recorded, self.full = None, 0, False

    def lookup(self, batch: BatchInfo) -> Tensor | None:
        """See `SharingPolicy.lookup`."""
        if self.store is None or self.recorded == 0:
            return None
        return with_mean_one(cycle_to(self.store[batch.place % self.recorded], batch.size))

    def commit(self, w: Tensor, valid: Tensor, batch: BatchInfo) -> None:
        """See `SharingPolicy.commit`. A refresh overwrites the row of its place in the epoch."""
        if self.store is None:
            self._allocate(w[None][:0], min(self.coefficient_steps, _FIRST_CAPACITY))
        assert self.store is not None
        rows = self.store[: self.recorded]
        if batch.size > self.store.shape[2]:  # the first batch was a short one
            self._allocate(cycle_to(rows, batch.size), len(self.store))
        elif batch.place >= len(self.store) and not self.full:
            self._allocate(rows, max(2 * len(self.store), batch.place + 1))
            self.full = batch.place >= len(self.store)
            if self.full:
                warnings.warn(
                    f'sharing="replay" keeps the coefficients of {len(self.store)} micro-batches, of more in an epoch, '
                    f"and overwrites the oldest: raise memory_budget, now {self.memory_budget} bytes",
                    stacklevel=2,
                )
        place = batch.place % len(self.store)
        self.recorded = max(self.recorded, place + 1)
        row = self.store[place]
        # Not brought to mean 1 here, so that a short batch gets exactly its own weights back.
        row.copy_(cycle_to(w, row.shape[1]).where(valid[:, None], row))

    def _allocate(self, rows: Tensor, capacity: int) -> None:
        """Give the store that many rows, as far as the budget goes, of which the first are those given."""
        affordable = max(1, self.memory_budget // (rows.shape[1:].numel() * rows.element_size()))
        store = rows.new_ones(min(capacity, affordable), *rows.shape[1:])
        self.recorded = min(len(rows), len(store))
        store[: self.recorded] = rows[: self.recorded]
        self.store = store

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
            self._allocate(rows, max(len(rows), min(self.coefficient_steps, _FIRST_CAPACITY)))
