"""transformers' Conv1D (GPT-2): a Linear whose weight is stored transposed, ``[i, o]``."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_fngd.layers.base import LayerKernel, LayerType, plain_class, register_layer_type
from hf_fngd.layers.linear import LinearKernel
from hf_fngd.weights.algebra import weighted_sum


class Conv1DKernel(LinearKernel):
    """``y = x W + b``."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output ``[N T, o]``."""
        flat = x.reshape(-1, x.shape[-1])
        return flat @ weight if bias is None else torch.addmm(bias, flat, weight), ()

    def input_gradient(self, x: Tensor, g: Tensor, weight: Tensor, saved: tuple[Tensor, ...]) -> Tensor:
        """See `ExplicitKernel.input_gradient`."""
        return (g @ weight.t()).view(x.shape)

    def product(self, a: Tensor, g: Tensor, w: Tensor | None) -> Tensor:
        """``[i, o]``: the roles of a and g swap, so that no transposed copy is made."""
        return weighted_sum(g, a, w)


class Conv1DType(LayerType):
    """Exactly `transformers.pytorch_utils.Conv1D`."""

    name: ClassVar[str] = "conv1d"

    def kernel(self, module: nn.Module) -> LayerKernel | None:
        """See `LayerType.kernel`."""
        return _KERNEL if plain_class(module) is Conv1D else None


_KERNEL: Any = Conv1DKernel()
register_layer_type(Conv1DType())
