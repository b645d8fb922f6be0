"""``uniform``: all weights are 1, to tell what the weights themselves contribute."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from hf_fngd.coefficients import Coefficients, with_weights
from hf_fngd.sharing.base import SharingPolicy, register_policy


@register_policy
class UniformSharing(SharingPolicy):
    """Averaging, as first-order methods do."""

    name: ClassVar[str] = "uniform"
    natural: ClassVar[bool] = False

    def solve(self, k: Tensor, damping: float) -> Coefficients:
        """See `SharingPolicy.solve`; the damping has no effect."""
        return with_weights(k, torch.ones_like(k[0]))
