"""``index``: coefficients that follow each sample through the epochs, by its index in the dataset."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_fngd.sharing.base import (
    BatchInfo,
    SharingPolicy,
    State,
    check_layers,
    register_policy,
    with_mean_one,
)

INDEX_COLUMN = "fngd_index"


def add_index(dataset: Any) -> Any:
    """Add the column that ``sharing="index"`` reads to a `datasets.Dataset`.

    The engine takes the column out of the model's inputs, in training and evaluation alike; ``model.generate`` does
    not pass through it, so leave data to generate from without the column. Trainer keeps it only with
    ``remove_unused_columns=False``.

    Args:
        dataset: a map-style `datasets.Dataset`.

    Returns:
        The dataset with an int64 column ``fngd_index`` that counts its rows.

    Raises:
        TypeError: the dataset has no ``add_column`` (an iterable dataset has no index to follow).
    """
    if not hasattr(dataset, "add_column") or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"add_index needs a map-style datasets.Dataset, got {type(dataset).__name__}; "
            'with an iterable dataset use sharing="ranked"'
        )
    return dataset.add_column(INDEX_COLUMN, list(range(len(dataset))))


@register_policy
class IndexSharing(SharingPolicy):
    """A table of weights ``[L, dataset size]``; a sample that was never weighted has weight 1.

    Args:
        size: number of rows of the dataset. None lets the table grow (by doubling) as larger indices appear.
    """

    name: ClassVar[str] = "index"
    needs_index: ClassVar[bool] = True

    def __init__(self, size: int | None = None) -> None:
        if size is not None and size < 1:
            raise ValueError(f"IndexSharing(size={size}): size is the number of rows of the dataset, at least 1")
        self.size = size
        self.table: Tensor | None = None

    def prepare(self, layers: int, coefficient_steps: int, memory_budget: int) -> None:
        """See `SharingPolicy.prepare`."""
        super().prepare(layers, coefficient_steps, memory_budget)
        self.memory_budget = memory_budget

    def lookup(self, batch: BatchInfo) -> Tensor | None:
        """See `SharingPolicy.lookup`; renormalized over the batch at hand."""
        if self.table is None:
            return None
        assert batch.index is not None
        index = batch.index.to(self.table.device)
        last = self.table.shape[1] - 1
        return with_mean_one(torch.where(index <= last, self.table[:, index.clamp(max=last)], 1))

    def commit(self, w: Tensor, valid: Tensor, batch: BatchInfo) -> None:
        """See `SharingPolicy.commit`."""
        assert batch.index is not None
        index = batch.index.to(w.device)
        if int(index.min()) < 0:
            raise ValueError(
                f"the column {INDEX_COLUMN!r} holds a negative index; it has to count the rows from 0, as "
                "hf_fngd.add_index does"
            )
        self._reserve(int(index.max()) + 1, w)
        assert self.table is not None
        self.table[:, index] = torch.where(valid[:, None], w, self.table[:, index])

    def _reserve(self, needed: int, w: Tensor) -> None:
        rows = 0 if self.table is None else self.table.shape[1]
        if needed <= rows:
            return
        if self.size is not None and needed > self.size:
            raise ValueError(
                f"a batch holds the sample {needed - 1}, beyond IndexSharing(size={self.size}): give it the number of "
                "rows of the dataset"
            )
        affordable = self.memory_budget // (self.layers * w.element_size())
        capacity = max(needed, min(2 * rows, affordable)) if self.size is None else self.size
        if capacity > affordable:
            raise ValueError(
                f'sharing="index" needs {capacity * self.layers * w.element_size()} bytes for {capacity} samples and '
                f'{self.layers} layers, memory_budget is {self.memory_budget}; raise it, or use sharing="ranked"'
            )
        grown = w.new_ones(self.layers, capacity)
        if self.table is not None:
            grown[:, :rows] = self.table
        self.table = grown

    def state_dict(self) -> State:
        """See `SharingPolicy.state_dict`."""
        return {} if self.table is None else {"table": self.table}

    def load_state_dict(self, state: State) -> None:
        """See `SharingPolicy.load_state_dict`."""
        table = state.get("table")
        if table is not None:
            check_layers(table.shape[0], self.layers)
        self.table = None if table is None else table.clone()
