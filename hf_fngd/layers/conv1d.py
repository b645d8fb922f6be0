"""transformers' Conv1D (GPT-2): a Linear whose weight is stored transposed, ``[i, o]``."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from hf_fngd.layers.base import register_kernel
from hf_fngd.layers.linear import LinearKernel
from hf_fngd.persample import weighted_sum


class Conv1DKernel(LinearKernel):
    """``y = x W + b``."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `LayerKernel.forward`."""
        flat = x.reshape(-1, x.shape[-1])
        y = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
        return y.view(*x.shape[:-1], weight.shape[1])

    def input_gradient(self, g: Tensor, weight: Tensor) -> Tensor:
        """See `LayerKernel.input_gradient`."""
        return g @ weight.t()

    def weighted_gradient(self, a: Tensor, g: Tensor, w: Tensor | None) -> Tensor:
        """``[i, o]``: the roles of a and g swap, so that no transposed copy is made."""
        return weighted_sum(g, a, w)


register_kernel(Conv1D, Conv1DKernel())
