"""torch's convolutions, transposed ones included.

The weighted gradient extracts no patches: the sample weights go on the input or on the output gradient, whichever is
smaller, and the convolution's own weight gradient does the rest (Sec. IV-C). Only the Gram matrix extracts patches.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from hf_fngd.layers.base import Call, Forward, Layout, Matrices, MatrixKernel, Saved, register_layer_type
from hf_fngd.layers.modules import operands
from hf_fngd.layers.subclass import base_of
from hf_fngd.weights.algebra import accumulation_dtype, scaled, tensor_norms
from hf_fngd.weights.gram import normalize
from hf_fngd.weights.patches import Geometry, gram_of_patches

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(eq=False)
class ConvolutionKernel(MatrixKernel):
    """``y = W * x + b``, channels first, over images of as many dimensions as the filter has."""

    size: tuple[int, ...]  # of the filter
    arguments: tuple[Any, ...]  # torch.convolution's after the bias: stride, padding, dilation and so on
    pad: tuple[int, ...]  # for F.pad, if torch.convolution cannot do the padding itself
    mode: str  # for F.pad
    adds = True

    def folds(self, dim: int) -> bool:
        return dim == 0

    def takes(self, x: Any, *others: Any) -> bool:
        """See `LayerKernel.takes`: an input with a batch dimension; a transposed one's output_size beside it."""
        transposed = self.arguments[3]
        return isinstance(x, Tensor) and x.dim() == len(self.size) + 2 and len(others) <= transposed

    def run(self, module: nn.Module, own: Forward, x: Tensor, call: Call) -> Tensor:
        assert isinstance(module, _ConvNd)
        others = [one for one in (*own.args, *own.keywords.values()) if one is not module and one is not x]
        kernel, now = self, _settings(module, x, *others)
        if now != (self.arguments, self.pad, self.mode):  # somebody changed the layer
            kernel = ConvolutionKernel(self.size, *now)
            call.take(kernel)  # another one: graphs of earlier calls have this one
        # Padded first, as torch does: autocast pads in float32.
        return call.apply(*operands(module, F.pad(x, kernel.pad, mode=kernel.mode) if any(kernel.pad) else x))

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        return torch.convolution(x, weight, bias, *self.arguments), ()

    def input_gradient(self, saved: Saved, g: Tensor) -> Tensor:
        return self._backward(saved.x, g, saved.weight, (True, False, False))[0]  # type: ignore[no-any-return]

    def weighted_gradient(
        self, saved: Saved, g: Tensor, w: Tensor | None, has_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        if w is not None and saved.x.numel() < g.numel():
            _, of_weight, _ = self._backward(scaled(saved.x, w), g, saved.weight, (False, True, False))
            return of_weight, torch.mv(g.flatten(2).sum(dim=2).t(), w.to(g.dtype)) if has_bias else None
        _, of_weight, of_bias = self._backward(saved.x, scaled(g, w), saved.weight, (False, True, has_bias))
        return of_weight, of_bias

    def _backward(self, x: Tensor, g: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]) -> Any:
        bias_sizes = [g.shape[1]] if wanted[2] else None
        stride, padding, dilation, transposed, output_padding, groups = self.arguments
        if transposed:  # a later call may have had another output_size
            of = zip(g.shape[2:], x.shape[2:], self.size, stride, padding, dilation, strict=True)
            output_padding = [out - (n - 1) * s + 2 * p - d * (k - 1) - 1 for out, n, k, s, p, d in of]
        arguments = stride, padding, dilation, transposed, output_padding, groups
        return torch.ops.aten.convolution_backward(g, x, weight, bias_sizes, *arguments, wanted)

    def layout(self, known: bool | None, x: Tensor | None, g: Tensor, samples: int) -> Layout:
        return super().layout(True, x, g, samples)  # `takes` made sure that dimension 0 is the batch

    def norms(self, x: Tensor | None, g: Tensor, has_bias: bool) -> Tensor:
        """``||x_n|| ||g_n||``; with a trained bias the root of ``||x_n||^2 + c`` in place of ``||x_n||``.

        An entry of x meets K / S entries of g, with K positions of the filter and S those of a stride. The bias meets
        each of g's Y positions once, as an input of ones would with a filter of one entry: ``c = Y S / K``.
        """
        assert x is not None
        of_x = tensor_norms(x)
        if has_bias:
            positions = g.shape[2:].numel() * math.prod(self.arguments[0]) / math.prod(self.size)
            of_x = torch.hypot(of_x, of_x.new_full((), positions**0.5))
        return tensor_norms(g) * of_x

    def gram(self, x: Tensor, g: Tensor, has_bias: bool, memory_budget: int) -> Tensor:
        """By patches of the input; for a transposed convolution by patches of the output gradient.

        A transposed convolution's weight gradient is that of the convolution from g to x: both change places.
        """
        stride, padding, dilation, transposed, _, groups = self.arguments
        if x.dim() == len(self.size) + 2:  # otherwise dimension 1 holds the several rows of a sample
            x, g = x.unsqueeze(1), g.unsqueeze(1)
        with torch.autocast(x.device.type, enabled=False):
            x, g = x.to(accumulation_dtype(x.dtype)), normalize(g)
            image, grads = (
                one.reshape(*one.shape[:2], groups, one.shape[2] // groups, *one.shape[3:])
                for one in ((g, x) if transposed else (x, g))
            )
            geometry = Geometry(self.size, stride, padding, dilation)
            k = gram_of_patches(image, grads, geometry, memory_budget=memory_budget)
            if has_bias:
                sums = g.transpose(1, 2).flatten(2).sum(dim=2)
                k.addmm_(sums, sums.t())
            return k.mul_(len(x))

    def matrices(self, weight: Tensor) -> Matrices:
        """``[o, i k]``, one matrix for each group of channels; for a transposed convolution ``[i, o k]``.

        The matrix maps a patch to a position. A transposed convolution maps a position to a patch; it is the adjoint of
        the convolution with the same filter, and has the same matrix.
        """
        return self.arguments[-1], weight.shape[1:].numel()

    def multiplications(self, x: Tensor, g: Tensor, weight: Tensor) -> int:
        transposed = self.arguments[3]
        return (x if transposed else g).numel() * weight.shape[1:].numel()


@register_layer_type("convolution")
def convolution_kernel(module: nn.Module) -> ConvolutionKernel | None:
    """Take torch's convolutions and subclasses that inherit the forward; any stride, padding, dilation, groups."""
    if base_of(module, *CONVOLUTIONS) is None:
        return None
    assert isinstance(module, _ConvNd)
    return ConvolutionKernel(module.kernel_size, *_settings(module))


def _settings(
    module: _ConvNd, x: Tensor | None = None, output_size: Any = None
) -> tuple[tuple[Any, ...], tuple[int, ...], str]:
    """The arguments of torch's convolution after the bias; F.pad's padding and mode."""
    dims = len(module.kernel_size)
    pad, padding, mode = (0,) * 2 * dims, module.padding, module.padding_mode
    if isinstance(padding, str) or mode != "zeros":
        # As torch does it: `_reversed_padding_repeated_twice` is F.pad's argument, also for "same" and "valid".
        pad, padding = tuple(module._reversed_padding_repeated_twice), (0,) * dims
    output_padding = module.output_padding
    if output_size is not None:
        sizes = [*output_size], module.stride, padding, module.kernel_size, dims, module.dilation
        output_padding = tuple(module._output_padding(x, *sizes))  # type: ignore[operator]
    arguments = (module.stride, padding, module.dilation, module.transposed, output_padding, module.groups)
    return arguments, pad, "constant" if mode == "zeros" else mode
