"""torch's convolutions, transposed ones included: weighted gradient and norms (a Gram matrix they do not form).

No patches are extracted. The sample weights go on the input or on the output gradient, whichever is smaller, and the
convolution's own weight gradient does the rest (Sec. IV-C).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from hf_fngd.layers.base import (
    Call,
    ExplicitKernel,
    Forward,
    LayerKernel,
    LayerType,
    Layout,
    operands,
    plain_class,
    register_layer_type,
)
from hf_fngd.weights.algebra import scaled, tensor_norms

_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class ConvolutionKernel(ExplicitKernel):
    """``y = W * x + b``, channels first; the arguments are those of torch's ``convolution``."""

    dims: int
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
    pad: tuple[int, ...]
    pad_mode: str

    def takes(self, x: Any) -> bool:
        """See `LayerKernel.takes`."""
        return isinstance(x, Tensor) and x.dim() == self.dims + 2

    def run(self, module: nn.Module, own: Forward, x: Tensor, call: Call) -> Tensor:
        """See `LayerKernel.run`. What torch's convolution cannot pad by itself is padded here."""
        x, weight, bias = operands(module, x)
        return call.apply(F.pad(x, self.pad, mode=self.pad_mode) if any(self.pad) else x, weight, bias)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `ExplicitKernel.forward`."""
        return torch.convolution(
            x, weight, bias, self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups
        ), ()

    def input_gradient(self, x: Tensor, g: Tensor, weight: Tensor, saved: tuple[Tensor, ...]) -> Tensor:
        """See `ExplicitKernel.input_gradient`."""
        gradient, _, _ = self._backward(x, g, weight, (True, False, False))
        assert gradient is not None
        return gradient

    def weighted_gradient(
        self, x: Tensor, g: Tensor, weight: Tensor, w: Tensor | None, saved: tuple[Tensor, ...], has_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """See `ExplicitKernel.weighted_gradient`."""
        if w is not None and x.numel() < g.numel():
            _, of_weight, _ = self._backward(scaled(x, w), g, weight, (False, True, False))
            sums = g.flatten(2).sum(dim=2)
            of_bias = torch.mv(sums.t(), w.to(g.dtype)) if has_bias else None
        else:
            _, of_weight, of_bias = self._backward(x, scaled(g, w), weight, (False, True, has_bias))
        assert of_weight is not None
        return of_weight, of_bias

    def _backward(self, x: Tensor, g: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]) -> Any:
        bias_sizes = [g.shape[1]] if wanted[2] else None
        return torch.ops.aten.convolution_backward(
            g,
            x,
            weight,
            bias_sizes,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
            wanted,
        )

    def layout(self, known: bool | None, x: Tensor | None, g: Tensor, samples: int) -> Layout:
        """See `LayerKernel.layout`. Of an input with a batch, which `takes` asks for, that is the first dimension."""
        return super().layout(True, x, g, samples)

    def norms(self, x: Tensor | None, g: Tensor, has_bias: bool) -> Tensor:
        """``||x_n|| ||g_n||``."""
        assert x is not None
        return tensor_norms(g) * tensor_norms(x)


class ConvolutionType(LayerType):
    """Exactly torch's convolutions, with any stride, padding, dilation and groups."""

    name: ClassVar[str] = "convolution"

    def kernel(self, module: nn.Module) -> LayerKernel | None:
        """See `LayerType.kernel`."""
        if plain_class(module) not in _TYPES:
            return None
        assert isinstance(module, _ConvNd)
        dims = len(module.kernel_size)
        pad: tuple[int, ...] = (0,) * (2 * dims)
        padding = module.padding
        if isinstance(padding, str) or module.padding_mode != "zeros":
            # As torch's own: `_reversed_padding_repeated_twice` has what F.pad takes, for "same" and "valid" too.
            pad, padding = tuple(module._reversed_padding_repeated_twice), (0,) * dims
        return ConvolutionKernel(
            dims,
            module.stride,
            padding,
            module.dilation,
            module.transposed,
            module.output_padding,
            module.groups,
            pad,
            "constant" if module.padding_mode == "zeros" else module.padding_mode,
        )


register_layer_type(ConvolutionType())
