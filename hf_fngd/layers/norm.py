"""LayerNorm and RMSNorm: torch's own, and those of transformers' models, which a rule recognizes.

torch's LayerNorm runs its fused kernel. Any other norm that multiplies by its one parameter, a vector, runs its own
forward on that vector expanded to one row a sample. The gradient of the expanded vector keeps the samples apart, so its
norms are exact.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fngd.layers.base import Call, ExplicitKernel, Forward, LayerKernel, Saved, register_layer_type
from hf_fngd.layers.modules import With, parameters, plain_class
from hf_fngd.samples.rows import ROW_IS_SAMPLE
from hf_fngd.weights.algebra import accumulation_dtype, scaled


@dataclass(frozen=True)
class LayerNormKernel(ExplicitKernel):
    """``y = (x - mean) / sqrt(variance + eps) * W + b`` over the last dimensions, of ``shape``.

    The normalized input has the same norm for every sample, so the norms are those of the output gradient.
    """

    shape: tuple[int, ...]
    eps: float

    def folds(self, dim: int) -> bool:
        return True

    def takes(self, x: Any, *others: Any) -> bool:
        return isinstance(x, Tensor) and x.dim() > len(self.shape) and not others

    def run(self, module: nn.Module, own: Forward, x: Tensor, call: Call) -> Tensor:
        if x.device.type != "cpu" and torch.is_autocast_enabled(x.device.type):
            x = x.float()  # as autocast does, on accelerators alone
        return call.apply(x, *parameters(module))

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, *moments = torch.native_layer_norm(x, self.shape, weight, bias, self.eps)
        return y, tuple(moments)

    def input_gradient(self, saved: Saved, g: Tensor) -> Tensor:
        return self._backward(saved, g, (True, False, False))[0]  # type: ignore[no-any-return]

    def weighted_gradient(
        self, saved: Saved, g: Tensor, w: Tensor | None, has_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        return self._backward(saved, scaled(g, w), (False, True, has_bias))[1:]  # type: ignore[no-any-return]

    def _backward(self, saved: Saved, g: Tensor, wanted: tuple[bool, bool, bool]) -> Any:
        x, weight, moments = saved
        bias = weight if wanted[2] else None  # only its shape is read
        return torch.ops.aten.native_layer_norm_backward(g, x, self.shape, *moments, weight, bias, wanted)


class VectorKernel(LayerKernel):
    """A norm that multiplies by a vector ``W`` of the size of the last dimension, by its own forward."""

    def folds(self, dim: int) -> bool:
        return True

    def run(self, module: nn.Module, own: Forward, x: Tensor, call: Call) -> Any:
        return plain_class(module).forward(With(module, weight=_expanded(module, x, call)), x)


class RMSNormKernel(LayerKernel):
    """torch's RMSNorm. Its function accepts no expanded vector, so it runs without one and we multiply."""

    def folds(self, dim: int) -> bool:
        return True

    def run(self, module: nn.Module, own: Forward, x: Tensor, call: Call) -> Tensor:
        assert isinstance(module, nn.RMSNorm)
        rows = _expanded(module, x, call)
        # As torch does: in half precision it rounds once, after the product.
        wide = x.to(accumulation_dtype(x.dtype))
        return (F.rms_norm(wide, module.normalized_shape, None, module.eps) * rows).to(x.dtype)


def _expanded(module: nn.Module, x: Tensor, call: Call) -> Tensor:
    """The vector expanded to one row a sample, ``[N, 1, ..., d]``, with a weighed gradient."""
    weight, _ = parameters(module)
    if call.rows is not None and not call.rows.row_is_sample:  # a sample has several rows: expanded to samples first
        of_samples = replace(call, rows=ROW_IS_SAMPLE).weigh(weight.expand(call.samples or 0, -1))
        own = x.shape[: call.rows.dim + 1]
        rows = call.rows.of_rows(of_samples, own.numel())
        return rows.view(*own, *[1] * (x.dim() - len(own) - 1), -1)
    return call.weigh(weight.expand(x.shape[0], *[1] * (x.dim() - 2), *weight.shape), like=x)


@register_layer_type("norm", default=False)  # it changed no result by more than seeds do, and costs time
def norm_kernel(module: nn.Module) -> LayerKernel | None:
    """Take `torch.nn.LayerNorm`, `torch.nn.RMSNorm`, and a model's own norms by a rule.

    The rule: the class is called "...Norm", the module has no submodules, its one parameter is a vector ``weight``, and
    a trial on some numbers shows that its forward computes the same with the vector expanded to one row a sample.
    """
    # The name comes first: asking for a weight that is computed from others may change a state.
    if "Norm" not in plain_class(module).__name__ and not isinstance(module, nn.LayerNorm):
        return None
    weight, forward = getattr(module, "weight", None), plain_class(module).forward
    if not isinstance(weight, nn.Parameter):
        return None
    if isinstance(module, nn.LayerNorm):
        own = LayerNormKernel(tuple(module.normalized_shape), module.eps)
        return own if forward is nn.LayerNorm.forward else None
    if weight.dim() != 1 or list(module.children()):
        return None
    if isinstance(module, nn.RMSNorm) and forward is nn.RMSNorm.forward:
        return RMSNormKernel()
    alone = [name for name, _ in module.named_parameters()] == ["weight"]
    return VectorKernel() if alone and _multiplies(module, len(weight), weight.dtype) else None


def _multiplies(module: nn.Module, size: int, dtype: torch.dtype) -> bool:
    """Whether the module's forward computes the same with its vector expanded to one row a sample."""
    x = torch.linspace(-1.0, 2.0, 6 * size).to(dtype).view(2, 3, size) ** 3
    rows = torch.linspace(0.5, 1.5, 2 * size).to(dtype).view(2, 1, size)
    forward = plain_class(module).forward
    try:
        with torch.no_grad():
            found = forward(With(module, weight=rows), x)
            return all(torch.equal(found[n], forward(With(module, weight=rows[n, 0]), x)[n]) for n in range(2))
    except Exception:  # whatever a model's own class does with a weight of another shape
        return False
