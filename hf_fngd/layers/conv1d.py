"""transformers' Conv1D (GPT-2): a Linear whose weight is stored transposed, ``[i, o]``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_fngd.layers.base import Saved, plain_class, register_layer_type
from hf_fngd.layers.linear import LinearKernel
from hf_fngd.weights.algebra import weighted_sum


class Conv1DKernel(LinearKernel):
    """``y = x W + b``."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output ``[N T, o]``."""
        flat = x.reshape(-1, x.shape[-1])
        return flat @ weight if bias is None else torch.addmm(bias, flat, weight), ()

    def input_gradient(self, saved: Saved, g: Tensor) -> Tensor:
        return (g @ saved.weight.t()).view(saved.x.shape)

    def product(self, a: Tensor, g: Tensor, w: Tensor | None) -> Tensor:
        """``[i, o]``: the roles of a and g swap, so that no transposed copy is made."""
        return weighted_sum(g, a, w)


@register_layer_type("conv1d")
def conv1d_kernel(module: nn.Module) -> Conv1DKernel | None:
    """Of exactly `transformers.pytorch_utils.Conv1D`."""
    return Conv1DKernel() if plain_class(module) is Conv1D else None
