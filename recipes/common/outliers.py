"""A stress test: a few samples of each batch whose loss counts many times."""

from __future__ import annotations

import torch
from torch import Tensor


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
