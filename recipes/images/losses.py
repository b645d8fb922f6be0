"""The training loss of the image recipe, and how much it rose."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from common.loss import OutlierArguments, make_loss

WINDOW = 50  # steps that a batch's loss is compared with


class TrainingLoss:
    """What Trainer's `compute_loss_func` takes: the loss of the options in training, else the plain cross entropy.

    Args:
        arguments: What is done to the losses of a training batch's samples.
        smoothing: Label smoothing of the cross entropy.
    """

    def __init__(self, arguments: OutlierArguments, smoothing: float) -> None:
        self.training, self.plain = make_loss(smoothing, arguments), make_loss(0.0)
        self._batches: list[Tensor] = []

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the sum over the samples, divided by their number in the whole batch, over all micro-batches."""
        if not torch.is_grad_enabled():  # evaluation
            return self.plain(outputs, labels, num_items_in_batch)
        with torch.no_grad():
            self._batches.append(self.plain(outputs, labels))
        return self.training(outputs, labels, num_items_in_batch)

    @property
    def batches(self) -> list[float]:
        """The plain cross entropy of each training batch, before outliers are multiplied."""
        return torch.stack(self._batches).tolist() if self._batches else []


def largest_rise(batches: Sequence[float], window: int = WINDOW) -> float | None:
    """Return the largest ratio of a batch's loss to the median, above 0, of the `window` batches before; else None."""
    medians = [statistics.median(batches[step - window : step]) for step in range(window, len(batches))]
    ratios = [loss / median for loss, median in zip(batches[window:], medians, strict=True) if median > 0]
    return max(ratios, default=None)
