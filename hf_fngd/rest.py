"""The parameters outside of the preconditioned layers, whose samples can be weighed too.

An embedding, a norm or a tied head has no Gram matrix of its own. With ``weigh_rest`` it shares those of the others
across layers, as the paper does within a block of them (Fig. 3): a sample's weight there is the mean over the
preconditioned layers of the weights that the sharing policy keeps. A sample that they make small is then small
everywhere.
"""

from __future__ import annotations

import re
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

# Each model has a norm of its own, alike in this: a function of one tensor and its own parameters.
_NORM = re.compile("Norm$")


@dataclass(eq=False)
class RestSlot:
    """One module outside of the preconditioned layers.

    Attributes:
        name: the module's name in the model.
        module: an embedding, a norm, or a Linear or Conv1D that is tied or left out.
        kernel: the conversions of a Linear or Conv1D, None for others.
        policy: the model's sharing policy.
        weighed: whether its samples were weighed at least once.
    """

    name: str
    module: nn.Module
    kernel: LayerKernel | None
    policy: SharingPolicy
    weighed: bool = False

    def weights(self, g: Tensor, batch: MicroBatch) -> Tensor | None:
        """The weights ``[N]`` of a micro-batch's samples; None for ones, as long as the policy has none.

        Args:
            g: the module's output gradient ``[N, ..., o]``. Its norms stand for those of h_n where the policy goes by
                them: the inputs are normalized, or rows of the identity.
            batch: the micro-batch of the forward pass.
        """
        # In a table of positions, [T, o], or where time comes first, the first dimension is not the batch.
        if batch.mean is None or len(g) != batch.info.size:
            return None
        self.weighed = True
        norms = None
        if self.policy.needs_norms:
            norms = torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=accumulation_dtype(g.dtype))
        return self.policy.decode(batch.mean.to(g.device), norms)


def select_rest(model: nn.Module, layers: Sequence[Selected], policy: SharingPolicy) -> list[RestSlot]:
    """The embeddings, norms and Linear or Conv1D modules with trained parameters that are not preconditioned."""
    taken = {id(layer.module) for layer in layers}
    return [
        RestSlot(name, module, kernel_for(module), policy)
        for name, module in model.named_modules()
        if id(module) not in taken
        and (type(module) is nn.Embedding or kernel_for(module) is not None or _NORM.search(type(module).__name__))
        and next(module.children(), None) is None
        and any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    ]


@dataclass(eq=False)
class RestCall:
    """One call of a module outside of the preconditioned layers, from its forward to the end of its backward.

    Attributes:
        slot: the module.
        batch: the micro-batch that the model was called with.
    """

    slot: RestSlot
    batch: MicroBatch

    @property
    def kernel(self) -> LayerKernel:
        """The conversions of a Linear or Conv1D."""
        assert self.slot.kernel is not None
        return self.slot.kernel

    def gradients(self, x: Tensor, g: Tensor, has_bias: bool) -> tuple[Tensor, Tensor | None]:
        """The weighted sums for weight and bias of a Linear or Conv1D; arguments as `LayerCall.gradients`."""
        w = self.slot.weights(g.view(*x.shape[:-1], g.shape[-1]), self.batch)
        samples = 1 if w is None else len(w)
        a, g = self.kernel.canonical(x, samples), self.kernel.canonical(g, samples)
        return self.kernel.weighted_gradient(a, g, w), weighted_bias_sum(g, w) if has_bias else None


@dataclass(eq=False)
class Graph:
    """A forward of any module, from a detached input to an output that is not handed on."""

    call: RestCall
    input: Tensor
    output: Tensor
    parameters: list[nn.Parameter]


class WeighedFunction(torch.autograd.Function):
    """A module whose parameters get the weighted sums of their per-sample gradients.

    Backward goes through the module's own graph once for the input, with the gradient as it is, and once for the
    parameters, with each sample's times its weight.
    """

    @staticmethod
    def forward(ctx: Any, graph: Graph, x: Tensor, *parameters: Tensor) -> Tensor:
        """The output that the module has computed; ``x`` and the parameters are here for their gradients."""
        ctx.graph = graph
        return graph.output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and the parameters."""
        graph, grad_x = ctx.graph, None
        if graph.input.requires_grad:
            (grad_x,) = torch.autograd.grad(graph.output, graph.input, g, retain_graph=True)
        w = graph.call.slot.weights(g, graph.call.batch)
        if w is not None:
            g = g * w.to(g.dtype).view(-1, *[1] * (g.dim() - 1))
        return None, grad_x, *torch.autograd.grad(graph.output, graph.parameters, g, retain_graph=True)


def call_rest(slot: RestSlot, own: Callable[..., Tensor], x: Tensor, batch: MicroBatch) -> Tensor:
    """Run a module outside of the preconditioned layers in a training forward pass.

    Args:
        slot: the module.
        own: its own forward.
        x: its only argument.
        batch: the micro-batch of the model's forward pass.
    """
    call = RestCall(slot, batch)
    if slot.kernel is not None:
        output: Tensor = PreconditionedFunction.apply(*operands(slot.module, x), call)  # type: ignore[no-untyped-call]
        return output.view(*x.shape[:-1], output.shape[-1])
    inner = x.detach().requires_grad_(x.requires_grad)
    parameters = [parameter for parameter in slot.module.parameters(recurse=False) if parameter.requires_grad]
    graph = Graph(call, inner, own(inner), parameters)
    return WeighedFunction.apply(graph, x, *parameters)  # type: ignore[no-any-return, no-untyped-call]
