"""``clipped``: every step takes its own weights, from the samples' gradient norms alone."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from hf_fngd.coefficients import Coefficients, with_weights
from hf_fngd.sharing.base import BatchInfo, SharingPolicy, register_policy


@register_policy
class ClippedSharing(SharingPolicy):
    """Each sample's gradient is clipped, layer by layer, at the median norm of its batch.

    The norms are those of the Gram matrix's diagonal in coefficient steps, which take place on the same schedule as
    elsewhere for the sake of rho, and the cheap ``||a_n|| ||g_n||`` in all others. Of the Fisher matrix this keeps the
    sizes of the samples' gradients and no directions; there is no damping, and nothing to store.
    """

    name: ClassVar[str] = "clipped"
    needs_norms: ClassVar[bool] = True
    follows: ClassVar[bool] = True

    def solve(self, k: Tensor, damping: float) -> Coefficients:
        """See `SharingPolicy.solve`; the damping has no effect."""
        return with_weights(k, clip(k.diagonal().clamp(min=0).sqrt()))

    def decode(self, w: Tensor, norms: Tensor | None) -> Tensor:
        """The weights of the batch at hand, from its norms."""
        assert norms is not None
        return clip(norms)

    def lookup(self, batch: BatchInfo) -> Tensor | None:
        """Ones, in whose place `decode` puts the weights."""
        return torch.ones(self.layers, batch.size)

    def commit(self, w: Tensor, valid: Tensor, batch: BatchInfo) -> None:
        """Nothing is stored."""


def clip(norms: Tensor) -> Tensor:
    """Weights ``[N]`` of mean 1 that bring norms ``[N]`` above the lower median down to it."""
    w = torch.where(norms > 0, norms.median() / norms, 1).clamp(max=1)
    return w / w.mean()
