"""Which samples got low weights: the report that ``sharing="index"`` can give."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

INDEX_COLUMN = "fngd_index"
WEIGHT_COLUMN = "fngd_weight"


@dataclass(frozen=True)
class Suspects:
    """The samples that coefficient steps weighted, the lowest mean weight first; all on the CPU.

    A low weight is a hint, not a verdict: a sample gets one where its gradient is long, as a wrong label makes it, or
    where the rest of its batch says the same. The samples' losses, averaged over the epochs, find more of the wrong
    labels; the weights are what a run has without keeping them.

    Attributes:
        index: the samples' indices in the dataset ``[M]`` (int64).
        weight: the mean of their weights, over layers and coefficient steps ``[M]``; 1 is plain averaging.
        count: in how many coefficient steps each was weighted ``[M]``.
    """

    index: Tensor
    weight: Tensor
    count: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write a line a sample, with the columns ``index``, ``weight`` and ``count``; makes the folder.

        Args:
            path: the file, which is replaced.
        """
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["index", "weight", "count"])
            writer.writerows(zip(self.index.tolist(), self.weight.tolist(), self.count.tolist(), strict=True))

    def add_to(self, dataset: Any) -> Any:
        """Add the mean weights to a `datasets.Dataset`, as its column ``fngd_weight``.

        Args:
            dataset: what `hf_fngd.add_index` returned, or a selection from it, in any order; or the dataset that it was
                made from, with the rows where they were.

        Returns:
            The dataset with the column, in place of an older one; NaN where a sample was never weighted.

        Raises:
            TypeError: the dataset has no ``add_column``.
            ValueError: it has no column ``fngd_index``, and fewer rows than the samples that were weighted need.
        """
        if not hasattr(dataset, "add_column") or not hasattr(dataset, "__len__"):
            raise TypeError(f"add_to needs a map-style datasets.Dataset, got {type(dataset).__name__}")
        if INDEX_COLUMN in dataset.column_names:
            rows = list(dataset[INDEX_COLUMN])
        elif len(self) and int(self.index.max()) >= len(dataset):
            raise ValueError(
                f"the sample {int(self.index.max())} was weighted, the dataset has {len(dataset)} rows: give add_to "
                f"the dataset that was trained on, or one with its column {INDEX_COLUMN!r}"
            )
        else:
            rows = list(range(len(dataset)))
        if WEIGHT_COLUMN in dataset.column_names:
            dataset = dataset.remove_columns(WEIGHT_COLUMN)
        known = dict(zip(self.index.tolist(), self.weight.tolist(), strict=True))
        return dataset.add_column(WEIGHT_COLUMN, [known.get(int(row), math.nan) for row in rows])
