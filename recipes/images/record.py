"""The losses of training, sample by sample and step by step."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

WINDOW = 50  # steps that a batch's loss is compared with


class LossRecord:
    """The loss of each training sample, summed over the epochs, and the mean loss of each batch.

    Args:
        samples: Rows of the training set.
    """

    def __init__(self, samples: int) -> None:
        self.sums = torch.zeros(samples, dtype=torch.float64)
        self.counts = torch.zeros(samples, dtype=torch.int64)
        self.batches: list[float] = []

    def add(self, index: Tensor, losses: Tensor) -> None:
        """Add a batch: rows `[N]`, losses `[N]`."""
        index = index.cpu()
        self.sums.index_add_(0, index, losses.double().cpu())
        self.counts.index_add_(0, index, torch.ones_like(index))
        self.batches.append(losses.mean().item())

    def means(self) -> Tensor:
        """Return each sample's loss averaged over the epochs, as it was in training; NaN where it was never seen."""
        return self.sums / self.counts  # 0 / 0 is NaN

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"sums": self.sums, "counts": self.counts, "batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of an interrupted run."""
        if state["sums"].shape != self.sums.shape:
            raise ValueError(
                f"The checkpoint is of {len(state['sums'])} training samples, this run has {len(self.sums)}: start "
                "it with the former's data options, or anew with --overwrite_output_dir."
            )
        self.sums, self.counts, self.batches = state["sums"], state["counts"], list(state["batches"])


def largest_rise(batches: Sequence[float], window: int = WINDOW) -> float | None:
    """Return the largest ratio of a batch's loss to the median of the `window` batches before; None without any."""
    ratios = [batches[step] / statistics.median(batches[step - window : step]) for step in range(window, len(batches))]
    return max(ratios, default=None)
