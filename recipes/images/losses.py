"""Training losses under label noise, from logits `[N, C]` and labels `[N]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from images.arguments import LossArguments
from images.record import LossRecord


def generalized_cross_entropy(logits: Tensor, labels: Tensor, q: float) -> Tensor:
    """Return (1 - p^q) / q of each sample, p the probability of its label (Zhang and Sabuncu, 2018).

    q -> 0 is the cross entropy, q = 1 is 1 - p, half the absolute error between probabilities and label.
    """
    return -torch.expm1(-q * F.cross_entropy(logits, labels, reduction="none")) / q


def smallest(losses: Tensor, dropped: float) -> Tensor:
    """Return a factor `[N]` for each loss: 0 for the share of the largest, and for the others what keeps a mean a mean.

    At least one loss is kept.
    """
    kept = max(1, round((1 - dropped) * len(losses)))
    factors = torch.zeros_like(losses)
    factors[losses.topk(kept, largest=False).indices] = len(losses) / kept
    return factors


class TrainingLoss:
    """What Trainer's `compute_loss_func` takes: the loss of the options in training, else the plain cross entropy.

    `index`, the rows of the training set that the next batch holds, has to be set before a training batch, since
    Trainer hands over labels only.

    Args:
        arguments: The loss and its parameters.
        smoothing: Label smoothing of the cross entropy.
        record: Takes the plain cross entropy of each training sample.
        epoch: Returns how many epochs are behind, for the growing share of `small_loss`.
    """

    def __init__(
        self, arguments: LossArguments, smoothing: float, record: LossRecord, epoch: Callable[[], float]
    ) -> None:
        self.arguments = arguments
        self.smoothing = smoothing
        self.record = record
        self.epoch = epoch
        self.index: Tensor | None = None

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the sum over the samples, divided by their number in the whole batch, over all micro-batches."""
        logits = self.arguments.clipped(outputs["logits"])
        plain = F.cross_entropy(logits, labels, reduction="none")
        samples = len(labels) if num_items_in_batch is None else num_items_in_batch
        if not torch.is_grad_enabled():  # evaluation
            return plain.sum() / samples
        if self.index is None:
            raise ValueError("A training batch has no index column: train on images.data.load's.")
        self.record.add(self.index, plain.detach())
        self.index = None
        losses = self._losses(logits, labels, plain)
        if self.arguments.loss == "small_loss":
            losses = losses * smallest(losses.detach(), self.dropped())
        return self.arguments.distort(losses).sum() / samples

    def dropped(self) -> float:
        """Return the share of `small_loss` that is dropped at this point of the training."""
        ramp = self.arguments.trim_epochs
        return self.arguments.trim * (min(1.0, self.epoch() / ramp) if ramp else 1.0)

    def _losses(self, logits: Tensor, labels: Tensor, plain: Tensor) -> Tensor:
        if self.arguments.loss == "gce":
            return generalized_cross_entropy(logits, labels, self.arguments.gce_q)
        if not self.smoothing:
            return plain
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.smoothing)
