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
from hf_fngd.sharing.suspects import INDEX_COLUMN, Suspects

# Of a sample's entry in ``count``.
_COUNT_BYTES = 4


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

    Attributes:
        table: the last weights of each sample ``[L, capacity]``; None before the first coefficient step.
        total: the sum over coefficient steps of its weight, averaged over the layers ``[capacity]``.
        count: in how many coefficient steps it was weighted ``[capacity]`` (int32).
    """

    table: Tensor | None = None
    total: Tensor | None = None
    count: Tensor | None = None

    name: ClassVar[str] = "index"
    needs_index: ClassVar[bool] = True
    follows: ClassVar[bool] = True

    def __init__(self, size: int | None = None) -> None:
        if size is not None and size < 1:
            raise ValueError(f"IndexSharing(size={size}): size is the number of rows of the dataset, at least 1")
        self.size = size

    def prepare(self, layers: int, coefficient_steps: int, memory_budget: int, rest: int = 0) -> None:
        """See `SharingPolicy.prepare`."""
        super().prepare(layers, coefficient_steps, memory_budget, rest)
        self.memory_budget = memory_budget
        self.table = self.total = self.count = None

    def lookup(self, batch: BatchInfo) -> Tensor | None:
        """See `SharingPolicy.lookup`; renormalized over the batch at hand."""
        if self.table is None:
            return None
        assert batch.index is not None
        index = batch.index.to(self.table.device)
        last = self.table.shape[1] - 1
        found = index.clamp(0, last)
        return with_mean_one(torch.where(index == found, self.table[:, found], 1))

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
        assert self.total is not None
        assert self.count is not None
        self.table[:, index] = torch.where(valid[:, None], w, self.table[:, index])
        usable = valid.sum()
        mean = torch.where(valid[:, None], w, 0).sum(dim=0) / usable.clamp(min=1)
        self.total.index_add_(0, index, mean)  # a sample may be in a batch twice
        self.count.index_add_(0, index, (usable > 0).to(self.count).expand(len(index)))

    def _reserve(self, needed: int, w: Tensor) -> None:
        rows = 0 if self.table is None else self.table.shape[1]
        if needed <= rows:
            return
        if self.size is not None and needed > self.size:
            raise ValueError(
                f"a batch holds the sample {needed - 1}, beyond IndexSharing(size={self.size}): give it the number of "
                "rows of the dataset"
            )
        bytes_each = (self.layers + 1) * w.element_size() + _COUNT_BYTES
        affordable = self.memory_budget // bytes_each
        capacity = max(needed, min(2 * rows, affordable)) if self.size is None else self.size
        if capacity > affordable:
            raise ValueError(
                f'sharing="index" needs {capacity * bytes_each} bytes for {capacity} samples and '
                f'{self.layers} layers, memory_budget is {self.memory_budget}; raise it, or use sharing="ranked"'
            )
        table, total = w.new_ones(self.layers, capacity), w.new_zeros(capacity)
        count = torch.zeros(capacity, dtype=torch.int32, device=w.device)
        if self.table is not None and self.total is not None and self.count is not None:
            table[:, :rows], total[:rows], count[:rows] = self.table, self.total, self.count
        self.table, self.total, self.count = table, total, count

    def suspects(self) -> Suspects:
        """The samples that were weighted, the lowest mean weight first, equal ones by index."""
        if self.total is None or self.count is None:
            nothing = torch.empty(0)
            return Suspects(nothing.long(), nothing, nothing.int())
        total, count = self.total.cpu(), self.count.cpu()
        index = count.nonzero().squeeze(1)
        mean = total[index] / count[index]
        order = mean.argsort(stable=True)
        return Suspects(index[order], mean[order], count[index[order]])

    def state_dict(self) -> State:
        """See `SharingPolicy.state_dict`."""
        return {} if self.table is None else {"table": self.table, "total": self.total, "count": self.count}

    def load_state_dict(self, state: State) -> None:
        """See `SharingPolicy.load_state_dict`."""
        table = state.get("table")
        if table is not None:
            check_layers(table.shape[0], self.layers)
        if table is None:
            self.table = self.total = self.count = None
            return
        self.table = table.clone()
        # Those of a state that was written before they were kept start from nothing.
        total, count = state.get("total"), state.get("count")
        self.total = table.new_zeros(table.shape[1]) if total is None else total.clone()
        self.count = torch.zeros_like(self.total, dtype=torch.int32) if count is None else count.clone()
