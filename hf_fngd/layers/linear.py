"""torch.nn.Linear: weight ``[o, i]``, any number of leading dimensions, the first of which is the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fngd.layers.base import Call, Forward, GramKernel, Saved, operands, plain_class, register_layer_type
from hf_fngd.weights.algebra import accumulation_dtype, sample_norms, weighted_bias_sum, weighted_sum
from hf_fngd.weights.gram import gram, normalize


@dataclass(frozen=True)
class LinearKernel(GramKernel):
    """``y = x W^T + b``.

    Attributes:
        tied: whether it is an output head that shares its weight with an embedding.
    """

    tied: bool = False

    def run(self, module: nn.Module, own: Forward, x: Tensor, call: Call) -> Tensor:
        y = call.apply(*operands(module, x))
        # Not inside the Function, whose output must be no view where a model changes it in place.
        return y.view(*x.shape[:-1], y.shape[-1])

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output ``[N T, o]``."""
        return F.linear(x.reshape(-1, x.shape[-1]), weight, bias), ()

    def input_gradient(self, saved: Saved, g: Tensor) -> Tensor:
        return (g @ saved.weight).view(saved.x.shape)

    def with_samples(self, x: Tensor, g: Tensor) -> Tensor:
        return g.view(*x.shape[:-1], g.shape[-1])

    def weighted_gradient(
        self, saved: Saved, g: Tensor, w: Tensor | None, has_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """``[o, i]`` and ``[o]``."""
        samples = 1 if w is None else len(w)
        a, g = _canonical(saved.x, samples), _canonical(g, samples)
        return self.product(a, g, w), weighted_bias_sum(g, w) if has_bias else None

    def product(self, a: Tensor, g: Tensor, w: Tensor | None) -> Tensor:
        """``sum_n w_n h_n`` of ``[N, T, i]`` and ``[N, T, o]``, in the layout of the layer's weight."""
        return weighted_sum(a, g, w)

    def norms(self, x: Tensor | None, g: Tensor, has_bias: bool) -> Tensor:
        """``||a_n|| ||g_n||``, a column of ones for a trained bias; of a tied head ``||g_n||``, as of its table."""
        if self.tied or x is None:
            return super().norms(x, g, has_bias)
        return sample_norms(_canonical(x, len(x)), _canonical(g, len(x)), bias=has_bias)

    def gram(self, x: Tensor, g: Tensor, has_bias: bool, memory_budget: int) -> Tensor:
        a, g = _canonical(x, len(x)), _canonical(g, len(x))
        with torch.autocast(a.device.type, enabled=False):
            dtype = accumulation_dtype(a.dtype)
            return gram(a.to(dtype), normalize(g.to(dtype)), bias=has_bias, memory_budget=memory_budget)


def _canonical(x: Tensor, samples: int) -> Tensor:
    """``[N, ..., f]``, or the same flattened, to ``[N, T, f]``; T = 1 where there is no dimension between."""
    return x.reshape(samples, x.shape[:-1].numel() // samples, x.shape[-1])


@register_layer_type("linear")
def linear_kernel(module: nn.Module) -> LinearKernel | None:
    """Of exactly `torch.nn.Linear`: quantized, LoRA and attention-internal subclasses compute other things."""
    return LinearKernel() if plain_class(module) is nn.Linear else None
