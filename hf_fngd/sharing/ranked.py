"""``ranked``: the most recent coefficients, matched by the rank of the samples' cheap gradient norms."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from hf_fngd.sharing.base import interpolate_to, register_policy
from hf_fngd.sharing.last import LastSharing


@register_policy
class RankedSharing(LastSharing):
    """Weights kept in the order of ``||a_n|| ||g_n||``, per layer.

    A weight then follows the kind of sample (its gradient is the largest of the batch, say) and not a place in
    a shuffled batch. Other batch sizes are reached by interpolation over the quantiles of the ranks.
    """

    name: ClassVar[str] = "ranked"
    needs_norms: ClassVar[bool] = True
    follows: ClassVar[bool] = True

    def fit(self, w: Tensor, size: int) -> Tensor:
        """See `LastSharing.fit`."""
        return interpolate_to(w, size)

    def encode(self, w: Tensor, norms: Tensor | None) -> Tensor:
        """See `SharingPolicy.encode`."""
        assert norms is not None
        return w[torch.argsort(norms)]

    def decode(self, w: Tensor, norms: Tensor | None) -> Tensor:
        """See `SharingPolicy.decode`."""
        assert norms is not None
        return torch.empty_like(w).scatter_(0, torch.argsort(norms), w)
