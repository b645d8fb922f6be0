"""torch.nn.Linear and transformers' Conv1D: any number of leading dimensions, the first of which is the batch."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_fngd.layers.base import Call, Forward, MatrixKernel, Saved, register_layer_type
from hf_fngd.layers.modules import operands, parameters, plain_class
from hf_fngd.layers.subclass import base_of, inherits
from hf_fngd.weights.algebra import ONE, tensor_norms, weighted_bias_sum, weighted_factors
from hf_fngd.weights.gram import gram, normalize

MATRICES: tuple[type[nn.Module], ...] = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class LinearKernel(MatrixKernel):
    """``y = x W^T + b``.

    Attributes:
        tied: whether the layer shares its weight with an embedding, as an output head may.
    """

    tied: bool = False

    def folds(self, dim: int) -> bool:
        return True

    @property
    def adds(self) -> bool:
        return not self.tied

    def run(self, module: nn.Module, own: Forward, x: Tensor, call: Call) -> Tensor:
        y = call.apply(*operands(module, x))
        # Not inside the Function: its output must be no view, since a model may change it in place.
        return y.view(*x.shape[:-1], y.shape[-1])

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output ``[N T, o]``."""
        return F.linear(x.flatten(0, -2), weight, bias), ()

    def input_gradient(self, saved: Saved, g: Tensor) -> Tensor:
        return torch.mm(g, saved.weight).view(saved.x.shape)

    def weighted_gradient(
        self, saved: Saved, g: Tensor, w: Tensor | None, has_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """``[o, i]`` and ``[o]``."""
        a, weighted = weighted_factors(saved.x.flatten(0, -2), g, w)
        of_bias = None
        if has_bias:
            of_bias = weighted_bias_sum(g, w) if weighted is g else weighted.sum(dim=0)
        return self.product(a, weighted), of_bias

    def product(self, a: Tensor, g: Tensor) -> Tensor:
        """The sum over the rows ``[N T, i]`` and ``[N T, o]``, in the layout of the layer's weight."""
        return torch.mm(g.t(), a)

    def norms(self, x: Tensor | None, g: Tensor, has_bias: bool) -> Tensor:
        """``sum_t ||a_nt|| ||g_nt||``, where a has a column of ones for a trained bias; of a tied head ``||g_n||``.

        Equal to ``||h_n||`` where T = 1, otherwise a bound. Positions without a gradient (padding) do not count.
        """
        assert x is not None
        if self.tied:  # as of the table that it shares its weight with
            return tensor_norms(g.reshape(x.shape[0], -1))
        of_g, of_x = tensor_norms(g), tensor_norms(x if x.dim() == 2 else x.flatten(0, -2))
        if has_bias:
            of_x = torch.hypot(of_x, ONE)
        of_g *= of_x
        samples = x.shape[0]
        return of_g if of_g.shape[0] == samples else of_g.view(samples, -1).sum(dim=1)

    def gram(self, x: Tensor, g: Tensor, has_bias: bool, memory_budget: int) -> Tensor:
        a, g = (rows.reshape(len(x), -1, rows.shape[-1]) for rows in (x, g))
        with torch.autocast(a.device.type, enabled=False):
            return gram(a, normalize(g), bias=has_bias, memory_budget=memory_budget)


class Conv1DKernel(LinearKernel):
    """``y = x W + b``: a Linear whose weight is stored transposed, ``[i, o]``."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output ``[N T, o]``."""
        flat = x.flatten(0, -2)
        return flat @ weight if bias is None else torch.addmm(bias, flat, weight), ()

    def input_gradient(self, saved: Saved, g: Tensor) -> Tensor:
        return torch.mm(g, saved.weight.t()).view(saved.x.shape)

    def product(self, a: Tensor, g: Tensor) -> Tensor:
        """``[i, o]``: no transposed copy is made."""
        return torch.mm(a.t(), g)

    def multiplications(self, x: Tensor, g: Tensor, weight: Tensor) -> int:
        return x.numel() * weight.shape[-1]


@dataclass(frozen=True)
class OwnLinearKernel(LinearKernel):
    """A subclass of Linear with a forward that computes the same in another way. That forward still runs.

    Attributes:
        module: the layer.
    """

    module: nn.Module = field(kw_only=True)

    def takes(self, x: Any, *others: Any) -> bool:
        if not super().takes(x, *others):
            return False
        # Its forward may accept another dtype than its weight's, which Linear refuses.
        return x.dtype == parameters(self.module)[0].dtype or torch.is_autocast_enabled(x.device.type)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output ``[N T, o]``; under autocast its dtype may differ from the operands'."""
        y: Tensor = plain_class(self.module).forward(self.module, x.reshape(-1, x.shape[-1]))
        return y, ()

    def input_gradient(self, saved: Saved, g: Tensor) -> Tensor:
        return super().input_gradient(saved, g.to(saved.weight.dtype))

    def weighted_gradient(
        self, saved: Saved, g: Tensor, w: Tensor | None, has_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        of_weight, _ = super().weighted_gradient(saved, g.to(saved.weight.dtype), w, has_bias=False)
        return of_weight, weighted_bias_sum(g, w) if has_bias else None

    def gram(self, x: Tensor, g: Tensor, has_bias: bool, memory_budget: int) -> Tensor:
        return super().gram(x, g.to(x.dtype), has_bias, memory_budget)


@register_layer_type("linear")
def linear_kernel(module: nn.Module) -> LinearKernel | None:
    """Take `torch.nn.Linear` and its subclasses that compute the same."""
    if base_of(module, *MATRICES) is not nn.Linear:
        return None
    return LinearKernel() if inherits(module, nn.Linear) else OwnLinearKernel(module=module)


@register_layer_type("conv1d")
def conv1d_kernel(module: nn.Module) -> Conv1DKernel | None:
    """Take `transformers.pytorch_utils.Conv1D` and its subclasses that inherit the forward."""
    return Conv1DKernel() if base_of(module, *MATRICES) is Conv1D else None
