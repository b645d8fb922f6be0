"""torch.nn.Linear: weight ``[o, i]``, any number of leading dimensions, the first of which is the batch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hf_fngd.layers.base import LayerKernel, register_kernel
from hf_fngd.persample import weighted_sum


class LinearKernel(LayerKernel):
    """``y = x W^T + b``."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `LayerKernel.forward`."""
        return F.linear(x, weight, bias)

    def input_gradient(self, g: Tensor, weight: Tensor) -> Tensor:
        """See `LayerKernel.input_gradient`."""
        return g @ weight

    def canonical(self, x: Tensor, samples: int) -> Tensor:
        """``[N, ..., f]`` to ``[N, T, f]``, T = 1 where there is no dimension between."""
        return x.reshape(samples, x.shape[:-1].numel() // samples, x.shape[-1])

    def weighted_gradient(self, a: Tensor, g: Tensor, w: Tensor | None) -> Tensor:
        """``[o, i]``."""
        return weighted_sum(a, g, w)


register_kernel(nn.Linear, LinearKernel())
