"""Embeddings and layers without a Gram matrix of their own, whose samples can be weighed too.

An embedding, a tied head or a layer that was left out shares the weights of the others across layers, as the paper
does within a block of layers (Fig. 3): with ``weigh_rest`` a sample's weight there is the mean over the preconditioned
layers of the weights that the sharing policy keeps. A sample that they make small is then small in these too. Norms
stay plain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hf_fngd.backward import MicroBatch, PreconditionedFunction, operands
from hf_fngd.layers import LayerKernel, kernel_for
from hf_fngd.persample import accumulation_dtype, weighted_bias_sum
from hf_fngd.selection import Selected
from hf_fngd.sharing import SharingPolicy


@dataclass(eq=False)
class RestSlot:
    """One module outside of the preconditioned layers.

    Attributes:
        place: index among them, counted on from the preconditioned layers.
        name: the module's name in the model.
        module: an embedding, or a Linear or Conv1D.
        kernel: the conversions of a Linear or Conv1D, None for an embedding.
        policy: the model's sharing policy.
        weighed: whether its samples were weighed at least once.
    """

    place: int
    name: str
    module: nn.Module
    kernel: LayerKernel | None
    policy: SharingPolicy
    weighed: bool = False

    def weights(self, g: Tensor, batch: MicroBatch | None) -> Tensor | None:
        """The weights ``[N]`` of a micro-batch's samples; None for ones, as long as the policy has none.

        Args:
            g: the module's output gradient ``[N, ..., o]``. Its norms stand for those of h_n where the policy goes by
                them: the inputs of an embedding are rows of the identity, those of a head as a rule normalized.
            batch: the micro-batch of the forward pass; None where it is not known any more.
        """
        if batch is None or batch.mean is None:
            return None
        # The first dimension is not the batch where time comes first, and in a table of positions, [T, o].
        if len(g) != batch.info.size or (self.kernel is None and g.dim() < 3):
            return None
        self.weighed = True
        norms = None
        if self.policy.needs_norms:
            norms = torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=accumulation_dtype(g.dtype))
        return self.policy.decode(batch.mean.to(g.device), norms)

    def weigh(self, g: Tensor, batch: MicroBatch | None) -> Tensor:
        """The output gradient, with each sample's times its weight; arguments as `weights`."""
        w = self.weights(g, batch)
        return g if w is None else g * w.to(g.dtype).view(-1, *[1] * (g.dim() - 1))


def select_rest(model: nn.Module, layers: Sequence[Selected], policy: SharingPolicy) -> list[RestSlot]:
    """The embeddings, Linear and Conv1D modules with a trained weight that are not preconditioned."""
    taken = {id(layer.module) for layer in layers}
    found = [
        (name, module)
        for name, module in model.named_modules()
        if id(module) not in taken
        and (isinstance(module, nn.Embedding) or kernel_for(module) is not None)
        and isinstance(module.weight, nn.Parameter)
        and module.weight.requires_grad
    ]
    return [
        RestSlot(place, name, module, kernel_for(module), policy)
        for place, (name, module) in enumerate(found, start=len(layers))
    ]


@dataclass(eq=False)
class RestCall:
    """One call of a Linear or Conv1D outside of the preconditioned layers; see `hf_fngd.backward.LayerCall`.

    Attributes:
        slot: the module.
        batch: the micro-batch that the model was called with; None where it is not known any more.
    """

    slot: RestSlot
    batch: MicroBatch | None

    @property
    def kernel(self) -> LayerKernel:
        """The conversions of the layer's type."""
        assert self.slot.kernel is not None
        return self.slot.kernel

    def gradients(self, x: Tensor, g: Tensor, has_bias: bool) -> tuple[Tensor, Tensor | None]:
        """The weighted sums for weight and bias, as `LayerCall.gradients`."""
        w = self.slot.weights(g.view(*x.shape[:-1], g.shape[-1]), self.batch)
        samples = 1 if w is None else len(w)
        a, g = self.kernel.canonical(x, samples), self.kernel.canonical(g, samples)
        return self.kernel.weighted_gradient(a, g, w), weighted_bias_sum(g, w) if has_bias else None


class WeighedFunction(torch.autograd.Function):
    """The identity; backward weighs the gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, slot: RestSlot, batch: MicroBatch) -> Tensor:
        """The output of an embedding."""
        ctx.slot, ctx.batch = slot, batch
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient that the embedding sums up."""
        return ctx.slot.weigh(g, ctx.batch), None, None


def call_rest(slot: RestSlot, own: Callable[..., Tensor], x: Tensor, batch: MicroBatch) -> Tensor:
    """Run a module outside of the preconditioned layers in a training forward pass.

    Args:
        slot: the module.
        own: its own forward.
        x: its only argument.
        batch: the micro-batch of the model's forward pass.
    """
    if slot.kernel is None:
        return WeighedFunction.apply(own(x), slot, batch)  # type: ignore[no-any-return, no-untyped-call]
    output: Tensor = PreconditionedFunction.apply(*operands(slot.module, x), RestCall(slot, batch))  # type: ignore[no-untyped-call]
    return output.view(*x.shape[:-1], output.shape[-1])
