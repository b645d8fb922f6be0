"""A stress test: a few samples of each batch whose loss counts many times."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common.arguments import option


@dataclass
class OutlierArguments:
    """How many samples, and how often they count; for a recipe's arguments to inherit."""

    outliers: int = option(0, "Samples of each training batch, drawn at random, whose loss is multiplied.")
    outlier_scale: float | None = option(None, "Factor of the outliers' loss. Default: 100.")

    def __post_init__(self) -> None:
        """Fill in the default; reject what is out of range or would be ignored."""
        if self.outliers < 0:
            raise ValueError(f"outliers is {self.outliers}; it must be at least 0.")
        if self.outlier_scale is not None and self.outliers == 0:
            raise ValueError("--outlier_scale needs --outliers, the number of such samples in a batch.")
        if self.outlier_scale is None:
            self.outlier_scale = 100.0


def scale_outliers(losses: Tensor, outliers: int, scale: float) -> Tensor:
    """Return losses `[N]` of which some, drawn anew in each call from torch's global generator, are multiplied.

    Args:
        losses: The samples' losses.
        outliers: How many of them; all where N is smaller.
        scale: The factor.
    """
    factors = torch.ones(len(losses))
    factors[torch.randperm(len(losses))[:outliers]] = scale
    return losses * factors.to(losses.device)
