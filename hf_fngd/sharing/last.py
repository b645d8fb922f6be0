"""``last``: the most recent coefficients, sample n of a batch taking the weight of sample n."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from hf_fngd.sharing.base import BatchInfo, SharingPolicy, State, check_layers, register_policy, repeat_to


@register_policy
class LastSharing(SharingPolicy):
    """One stored row of weights a layer, ``[L, N]``, overwritten in place by every coefficient step.

    A batch of less than half the stored size (the last of an epoch) leaves the row as it is: its few weights
    would otherwise be stretched over all batches until the next coefficient step.
    """

    name: ClassVar[str] = "last"

    row: Tensor | None = None

    def prepare(self, layers: int, coefficient_steps: int, memory_budget: int, rest: int = 0) -> None:
        """See `SharingPolicy.prepare`."""
        super().prepare(layers, coefficient_steps, memory_budget, rest)
        self.row = None

    def fit(self, w: Tensor, size: int) -> Tensor:
        """Rows ``[L, M]`` for batches of another size, ``[L, size]``."""
        return repeat_to(w, size)

    def lookup(self, batch: BatchInfo) -> Tensor | None:
        """See `SharingPolicy.lookup`."""
        return None if self.row is None else self.fit(self.row, batch.size)

    def commit(self, w: Tensor, valid: Tensor, batch: BatchInfo) -> None:
        """See `SharingPolicy.commit`."""
        if self.row is None:
            self.row = torch.ones_like(w)
        elif self.row.shape[1] < batch.size:  # the first batch was a short one
            self.row = self.fit(self.row, batch.size)
        elif 2 * batch.size < self.row.shape[1]:
            return
        fitted = self.fit(w, self.row.shape[1])
        self.row.copy_(torch.where(valid[:, None], fitted, self.row))

    def state_dict(self) -> State:
        """See `SharingPolicy.state_dict`."""
        return {} if self.row is None else {"row": self.row}

    def load_state_dict(self, state: State) -> None:
        """See `SharingPolicy.load_state_dict`."""
        row = state.get("row")
        if row is not None:
            check_layers(row.shape[0], self.layers)
        self.row = None if row is None else row.clone()
