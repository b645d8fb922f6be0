"""LayerNorm and RMSNorm: of torch, and of transformers' models, whose classes are taken by a rule.

torch's LayerNorm has a fused kernel, which runs here as it does there. Any other norm that multiplies by its one
parameter, a vector, runs its own forward on that vector expanded to one row a sample. The gradient of the expanded
vector has the samples apart, so its norms are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fngd.layers.base import Call, ExplicitKernel, Forward, LayerKernel, LayerType, plain_class, register_layer_type
from hf_fngd.weights.algebra import scaled


@dataclass(frozen=True)
class LayerNormKernel(ExplicitKernel):
    """``y = (x - mean) / sqrt(variance + eps) * W + b`` over the last dimensions.

    The normalized input has the same norm for every sample, so that the norms are those of the output gradient.
    """

    shape: tuple[int, ...]
    eps: float

    def takes(self, x: Any) -> bool:
        """See `LayerKernel.takes`."""
        return isinstance(x, Tensor) and x.dim() > len(self.shape)

    def run(self, module: nn.Module, own: Forward, x: Tensor, call: Call) -> Tensor:
        """See `LayerKernel.run`."""
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        if x.device.type != "cpu" and torch.is_autocast_enabled(x.device.type):
            x = x.float()  # as autocast does, on accelerators alone
        return call.apply(x, weight, bias)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `ExplicitKernel.forward`."""
        y, mean, rstd = torch.native_layer_norm(x, self.shape, weight, bias, self.eps)
        return y, (mean, rstd)

    def input_gradient(self, x: Tensor, g: Tensor, weight: Tensor, saved: tuple[Tensor, ...]) -> Tensor:
        """See `ExplicitKernel.input_gradient`."""
        gradient, _, _ = self._backward(x, g, weight, saved, (True, False, False))
        assert gradient is not None
        return gradient

    def weighted_gradient(
        self, x: Tensor, g: Tensor, weight: Tensor, w: Tensor | None, saved: tuple[Tensor, ...], has_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """See `ExplicitKernel.weighted_gradient`."""
        _, of_weight, of_bias = self._backward(x, scaled(g, w), weight, saved, (False, True, has_bias))
        assert of_weight is not None
        return of_weight, of_bias

    def _backward(
        self, x: Tensor, g: Tensor, weight: Tensor, saved: tuple[Tensor, ...], wanted: tuple[bool, bool, bool]
    ) -> Any:
        bias = weight if wanted[2] else None  # whose shape alone is read
        return torch.ops.aten.native_layer_norm_backward(g, x, self.shape, *saved, weight, bias, wanted)


class VectorKernel(LayerKernel):
    """A norm that multiplies by a vector ``W`` of the size of the last dimension, by its own forward."""

    def run(self, module: nn.Module, own: Forward, x: Tensor, call: Call) -> Any:
        """See `LayerKernel.run`."""
        return _forward_of(module)(_With(module, _expanded(module, x, call)), x)


class RMSNormKernel(VectorKernel):
    """torch's own, whose function takes a vector of its shape alone: it runs without, and the product is ours."""

    def run(self, module: nn.Module, own: Forward, x: Tensor, call: Call) -> Tensor:
        """See `LayerKernel.run`."""
        assert isinstance(module, nn.RMSNorm)
        rows = _expanded(module, x, call)
        return F.rms_norm(x, module.normalized_shape, None, module.eps) * rows


def _expanded(module: nn.Module, x: Tensor, call: Call) -> Tensor:
    """The vector in one row a sample, ``[N, 1, ..., d]``, whose gradient is weighed."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return call.weigh(weight.expand(x.shape[0], *[1] * (x.dim() - 2), *weight.shape), like=x)


class _With:
    """A module as its own forward sees it, with another weight."""

    def __init__(self, module: nn.Module, weight: Tensor) -> None:
        self._module, self.weight = module, weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _forward_of(module: nn.Module) -> Forward:
    return plain_class(module).forward


class NormType(LayerType):
    """`torch.nn.LayerNorm`, `torch.nn.RMSNorm`, and norms of a model's own that keep to the rule of RMSNorm.

    The rule: the class is called "...Norm", the module has no submodules, its one parameter is a vector ``weight``, and
    with the vector expanded to one row a sample its forward computes the same, which is tried on some numbers.
    """

    name: ClassVar[str] = "norm"

    def kernel(self, module: nn.Module) -> LayerKernel | None:
        """See `LayerType.kernel`."""
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter):
            return None
        if isinstance(module, nn.LayerNorm):
            exact = plain_class(module).forward is nn.LayerNorm.forward
            return LayerNormKernel(tuple(module.normalized_shape), module.eps) if exact else None
        if isinstance(module, nn.RMSNorm) and weight.dim() == 1 and plain_class(module).forward is nn.RMSNorm.forward:
            return RMSNormKernel()
        follows_rule = (
            "Norm" in plain_class(module).__name__
            and [*dict(module.named_parameters())] == ["weight"]
            and weight.dim() == 1
            and not list(module.children())
        )
        return VectorKernel() if follows_rule and _multiplies(module, len(weight), weight.dtype) else None


def _multiplies(module: nn.Module, size: int, dtype: torch.dtype) -> bool:
    """Whether the module's forward computes the same with its vector expanded to one row a sample."""
    x = torch.linspace(-1.0, 2.0, 6 * size).to(dtype).view(2, 3, size) ** 3
    rows = torch.linspace(0.5, 1.5, 2 * size).to(dtype).view(2, 1, size)
    forward = _forward_of(module)
    try:
        with torch.no_grad():
            found = forward(_With(module, rows), x)
            return all(torch.equal(found[n], forward(_With(module, rows[n, 0]), x)[n]) for n in range(2))
    except Exception:  # whatever a model's own class does with a weight of another shape
        return False


register_layer_type(NormType())
