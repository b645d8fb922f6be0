"""What a graph of torch.compile sees of the engine: three opaque operators and a tensor between them.

A traced graph keeps no Python objects, and an integer that changes from step to step would recompile it. So the
micro-batch travels through it as a number in a tensor: `begin` numbers the forward pass, and `gradients` finds it by
that number when backward runs. The graph has no break, and runs on unchanged through coefficient steps, shared steps
and any state of the store. Calls of a layer are not counted in it (what only backward reads, a compiler moves there): a
layer that is called more than once is found out in its first backward pass, and is plain from then on. A weight that is
used outside of its layer's forward as well is not found out.
"""

from __future__ import annotations

import inspect
import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor, library, nn

from hf_fngd.backward import Call, LayerCall, LayerSlot, MicroBatch, operands
from hf_fngd.layers import LayerKernel
from hf_fngd.rest import RestCall, RestSlot


class Engine(Protocol):
    """What the operators need of a preconditioner."""

    slots: list[LayerSlot]
    rest: list[RestSlot]

    def begin(self, size: int, index: Tensor | None) -> MicroBatch:
        """A training forward pass begins."""


# In a CUDA graph the operators would not run again, and would read the weights of the step that was captured.
_TAGS: dict[str, Any] = (
    {"tags": (torch.Tag.cudagraph_unsafe,)}
    if hasattr(torch.Tag, "cudagraph_unsafe") and "tags" in inspect.signature(library.custom_op).parameters
    else {}  # of versions that capture nothing which takes a tensor on the CPU, as the micro-batch's number is
)
_engines: weakref.WeakValueDictionary[int, Engine] = weakref.WeakValueDictionary()
_numbers = itertools.count()
# Kept alive by their engine until the optimizer's step.
_batches: weakref.WeakValueDictionary[int, MicroBatch] = weakref.WeakValueDictionary()


def register(engine: Engine) -> int:
    """A number by which the operators find an engine."""
    number = next(_numbers)
    _engines[number] = engine
    return number


def number(batch: MicroBatch) -> Tensor:
    """A number by which the operators find a micro-batch, an int64 scalar on the CPU."""
    found = next(_numbers)
    _batches[found] = batch
    return torch.tensor(found)


@library.custom_op("hf_fngd::begin", mutates_args=(), **_TAGS)
def begin(sample: Tensor, index: Tensor | None, engine: int) -> Tensor:
    """Begin a forward pass with a batch as large as ``sample``; returns its `number`."""
    return number(_engines[engine].begin(sample.shape[0], index))


@begin.register_fake
def _(sample: Tensor, index: Tensor | None, engine: int) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


@library.custom_op("hf_fngd::gradients", mutates_args=(), **_TAGS)
def gradients(
    x: Tensor, g: Tensor, weight: Tensor, batch: Tensor, layer: int, engine: int, has_bias: bool
) -> tuple[Tensor, Tensor]:
    """`LayerCall.gradients` of a layer; a bias gradient that is not asked for is empty."""
    call = _call(batch, layer, engine, x.numel() > 0)
    grad_weight, grad_bias = call.gradients(x, g, has_bias)
    return grad_weight.contiguous(), g.new_empty(0) if grad_bias is None else grad_bias


def _call(batch: Tensor, place: int, engine: int, known: bool = True) -> Call:
    """The call of a layer, or of a module of the rest behind the layers, that a backward pass belongs to."""
    # None where backward comes after the optimizer's step: too late to weigh anything.
    found = _batches.get(int(batch)) if known else None
    slots, rest = _engines[engine].slots, _engines[engine].rest
    if place >= len(slots):
        return RestCall(rest[place - len(slots)], found)
    call = LayerCall(slots[place], found)
    if found is None:
        return call
    if found.complete:  # a retained graph runs backward again, with the same weights
        return found.calls_of_graphs.get(place, call)
    found.calls_of_graphs[place] = call
    return call


@gradients.register_fake
def _(
    x: Tensor, g: Tensor, weight: Tensor, batch: Tensor, layer: int, engine: int, has_bias: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(weight.shape), g.new_empty(g.shape[-1] if has_bias else 0)


class CompiledFunction(torch.autograd.Function):
    """`hf_fngd.backward.PreconditionedFunction`, made of tensors and numbers."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        batch: Tensor,
        kernel: LayerKernel,
        layer: int,
        engine: int,
        has_bias: bool,
    ) -> Tensor:
        """The layer's own forward, flattened to ``[N T, o]``."""
        ctx.save_for_backward(x, weight, batch)
        ctx.kernel, ctx.layer, ctx.engine, ctx.has_bias = kernel, layer, engine, has_bias
        return kernel.forward(x.reshape(-1, x.shape[-1]), weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias."""
        x, weight, batch = ctx.saved_tensors
        grad_weight, grad_bias = torch.ops.hf_fngd.gradients(x, g, weight, batch, ctx.layer, ctx.engine, ctx.has_bias)
        return (
            ctx.kernel.input_gradient(g, weight).view(x.shape),
            grad_weight,
            grad_bias if ctx.has_bias else None,
            None,
            None,
            None,
            None,
            None,
        )


@library.custom_op("hf_fngd::weigh", mutates_args=(), **_TAGS)
def weigh(g: Tensor, input_norms: Tensor | None, batch: Tensor, place: int, engine: int) -> Tensor:
    """`RestCall.weigh` of an embedding or a convolution."""
    call = _call(batch, place, engine)
    assert isinstance(call, RestCall)
    call.input_norms = input_norms
    weighed = call.weigh(g)
    return weighed.clone() if weighed is g else weighed


@weigh.register_fake
def _(g: Tensor, input_norms: Tensor | None, batch: Tensor, place: int, engine: int) -> Tensor:
    return torch.empty_like(g)


class CompiledWeighing(torch.autograd.Function):
    """`hf_fngd.rest.WeighedFunction`, made of tensors and numbers."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, input_norms: Tensor | None, batch: Tensor, place: int, engine: int) -> Tensor:
        """The output, as a tensor of its own, which a model may change in place."""
        ctx.save_for_backward(input_norms, batch)
        ctx.place, ctx.engine = place, engine
        return y.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient that the module sums up."""
        input_norms, batch = ctx.saved_tensors
        return torch.ops.hf_fngd.weigh(g, input_norms, batch, ctx.place, ctx.engine), None, None, None, None


def weigh_output(y: Tensor, input_norms: Tensor | None, place: int, batch: Tensor, engine: int) -> Tensor:
    """Hand on the output of an embedding or a convolution in a traced training forward pass.

    Args:
        y: the output.
        input_norms: see `RestSlot.weights`.
        place: the module's index, counted on from the layers.
        batch: what `begin` returned.
        engine: what `register` returned.
    """
    return CompiledWeighing.apply(  # type: ignore[no-any-return, no-untyped-call]
        y, input_norms, batch, place, engine
    )


def call_layer(module: nn.Module, x: Tensor, kernel: LayerKernel, place: int, batch: Tensor, engine: int) -> Tensor:
    """Run an attached layer, or a tied head, in a traced training forward pass.

    Args:
        module: the module.
        x: its input.
        kernel: the conversions of its type.
        place: its index among the layers, or among those of the rest behind them.
        batch: what `begin` returned.
        engine: what `register` returned.
    """
    x, weight, bias = operands(module, x)
    has_bias = bias is not None and bias.requires_grad
    output: Tensor = CompiledFunction.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, batch, kernel, place, engine, has_bias
    )
    return output.view(*x.shape[:-1], output.shape[-1])
