"""The training loss; a stress test, a few samples whose loss counts many times; and the simplest remedies, bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common.arguments import option
from hf_fngd import clip_samples


@dataclass
class OutlierArguments:
    """How many samples, and how often they count; for a recipe's arguments to inherit."""

    outliers: float = option(
        0,
        "Samples of each training batch, drawn at random, whose loss is multiplied; a fraction: in as many batches.",
    )
    outlier_scale: float | None = option(None, "Factor of the outliers' loss. Default: 100.")
    loss_bound: float | None = option(
        None, "Bound of a sample's loss, in units of the median of its batch: what is above is scaled down to it."
    )
    clip_outputs: bool = option(
        False,
        "Clip each sample's gradient at the logits, at the mean norm of its batch: all layers share a sample weight.",
    )

    def __post_init__(self) -> None:
        """Fill in the default; reject what is out of range or would be ignored."""
        if self.outliers < 0:
            raise ValueError(f"outliers is {self.outliers}; it must be at least 0.")
        if self.outlier_scale is not None and self.outliers == 0:
            raise ValueError("--outlier_scale needs --outliers, the number of such samples in a batch.")
        if self.outlier_scale is None:
            self.outlier_scale = 100.0
        if self.loss_bound is not None and self.loss_bound <= 0:
            raise ValueError(f"loss_bound is {self.loss_bound}; it must be above 0.")

    @property
    def of_samples(self) -> bool:
        """Whether the loss has to be known sample by sample."""
        return self.outliers > 0 or self.loss_bound is not None

    @property
    def distortion(self) -> str:
        """What is done to the losses and to the gradients, in words; empty where nothing is."""
        parts = []
        if self.outliers:
            parts.append(f"the loss of {self.outliers:g} sample(s) a batch counts {self.outlier_scale:g} times")
        if self.loss_bound is not None:
            parts.append(f"a sample's loss is bounded at {self.loss_bound:g} times its batch's median")
        if self.clip_outputs:
            parts.append("each sample's gradient is clipped at the logits")
        return "; ".join(parts)

    def distort(self, losses: Tensor) -> Tensor:
        """Return the losses `[N]` of a training batch's samples with outliers among them, bounded."""
        if self.outliers:
            losses = scale_outliers(losses, self.outliers, self.outlier_scale or 1.0)
        return losses if self.loss_bound is None else bound(losses, self.loss_bound)

    def clipped(self, logits: Tensor) -> Tensor:
        """Hand on the logits `[N, ..., C]` of a batch; their gradients are clipped where `clip_outputs` says so."""
        return clip_samples(logits) if self.clip_outputs else logits


def scale_outliers(losses: Tensor, outliers: float, scale: float) -> Tensor:
    """Return losses `[N]` of which some, drawn anew in each call from torch's global generator, are multiplied.

    Args:
        losses: The samples' losses.
        outliers: How many of them, in the mean; all where N is smaller.
        scale: The factor.
    """
    factors, count = torch.ones(len(losses)), int(outliers)
    if outliers > count:
        count += int(torch.rand(()) < outliers - count)
    factors[torch.randperm(len(losses))[:count]] = scale
    return losses * factors.to(losses.device)


def bound(losses: Tensor, limit: float) -> Tensor:
    """Scale the losses `[N]` that are above `limit` times the median down to it, and their gradients with them."""
    value = losses.detach()
    tiny = torch.finfo(value.dtype).tiny  # a cross entropy of 0 may be -0
    return losses * (limit * value.median() / value.clamp(min=tiny)).clamp(max=1)


def make_loss(label_smoothing: float, outliers: OutlierArguments | None = None) -> Callable[..., Tensor]:
    """Return the label-smoothed cross entropy for Trainer's `compute_loss_func`.

    It is the mean over the labels of the whole batch (target tokens, or rows to classify), over all micro-batches
    and processes. The model's own loss is not: Marian, or BERT's classifier, ignores `num_items_in_batch`, so that
    Trainer would make its gradient larger by the number of accumulation steps. With smoothing it equals Trainer's
    LabelSmoother, in less time and memory.

    Args:
        label_smoothing: The share of the target that is spread over all labels.
        outliers: What is done to the losses of a training batch's samples.
    """

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits = outputs["logits"] if outliers is None else outliers.clipped(outputs["logits"])
        losses = partial(F.cross_entropy, logits.flatten(0, -2), labels.flatten(), label_smoothing=label_smoothing)
        if outliers is not None and outliers.of_samples and torch.is_grad_enabled():
            total = outliers.distort(losses(reduction="none").view(len(labels), -1).sum(1)).sum()
        else:
            total = losses(reduction="sum")
        return total / (labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)

    return loss
