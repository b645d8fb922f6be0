"""``clipped``: every step takes its own weights, from the samples' gradient norms alone."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from hf_fngd.coefficients import Coefficients, with_weights
from hf_fngd.sharing.base import BatchInfo, SharingPolicy, register_policy


@register_policy
class ClippedSharing(SharingPolicy):
    """Each sample's gradient is clipped, layer by layer, at the mean norm of its batch.

    One that is X times as long as the others keeps a lead of about X / N in a batch of N. A bound that leaves none, as
    the median, silences the few samples that a well fitted model has yet to learn, whose gradients are outsized too.
    The norms are those of the Gram matrix's diagonal in coefficient steps, which serve rho alone, and the cheap
    ``||a_n|| ||g_n||`` in all others. Of the Fisher matrix this keeps the sizes of the samples' gradients and no
    directions; there is no damping, and nothing to store.
    """

    name: ClassVar[str] = "clipped"
    natural: ClassVar[bool] = False
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
    """Weights ``[N]`` of mean 1 that bring norms ``[N]`` above their mean down to it."""
    mean = norms.mean().clamp(min=torch.finfo(norms.dtype).tiny)  # ones, where all of them are 0
    w = mean / torch.maximum(norms, mean)
    return w / w.mean()
