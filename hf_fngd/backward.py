"""What happens to one layer in one forward and one backward pass.

The layer's forward goes through an autograd Function whose backward returns ``sum_n w_n h_n`` in place of the
weight gradient, so that ``p.grad`` *is* the preconditioned gradient when backward returns and whatever acts
on ``p.grad`` (clipping, loss scaling, accumulation, all-reduce) works unchanged. The batch-mean gradient is
never computed, and no per-sample gradient is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.function import once_differentiable

from hf_fngd.coefficients import with_weights
from hf_fngd.layers import LayerKernel
from hf_fngd.persample import accumulation_dtype, gram, normalize, sample_norms, weighted_bias_sum
from hf_fngd.sharing import BatchInfo, SharingPolicy

NOT_THE_BATCH = "the first dimension of its input is not the batch"
AMBIGUOUS = (
    "two dimensions of its input have the size of the batch, and no batch so far told which of them holds the samples "
    "(another batch size or sequence length does)"
)
CALLED_AGAIN = "it is called more than once in a forward pass"
USED_ELSEWHERE = "its weight is used outside of its forward as well"
ON_TOP_OF_ANOTHER = "reentrant activation checkpointing ran several forward passes before a backward pass"


def in_backward() -> bool:
    """Whether a backward pass is under way, as it is where activation checkpointing recomputes a forward pass."""
    return bool(torch._C._current_graph_task_id() != -1)


@dataclass(eq=False)
class MicroBatch:
    """One forward and backward pass of the model, as its layers see it.

    Attributes:
        info: size, place and dataset indices.
        computes: whether this is a coefficient step.
        stored: weights of a shared step ``[L, N]``; None for w = 1, or those of `SharingPolicy.weigh`.
        calls: how often each layer, and each module of the rest behind them, was called in the forward pass.
        layers: how many layers are preconditioned, L.
        mean: weights of the samples in the rest ``[N]``; None for w = 1, or those of `SharingPolicy.weigh`.
        norms: those of the samples' gradients ``[N]``, by layer, and module of the rest behind them.
        weighed: weights of `SharingPolicy.weigh` ``[N]``, by layer.
        fresh: encoded weights of a coefficient step ``[L, N]``, filled layer by layer.
        rho: the noise ratios that go with them ``[L]``; NaN where a layer measured none.
        recomputed: whether the forward pass is one that checkpointing of the whole model recomputes.
        reached: whether a backward pass reached any layer.
        complete: whether that backward pass came to its end.
        calls_of_graphs: what a backward pass of torch.compile did, by layer.
    """

    info: BatchInfo
    computes: bool
    stored: Tensor | None
    calls: list[int]
    layers: int
    mean: Tensor | None = None
    norms: dict[int, Tensor] = field(default_factory=dict)
    weighed: dict[int, Tensor] = field(default_factory=dict)
    fresh: Tensor | None = None
    rho: Tensor | None = None
    recomputed: bool = False
    reached: bool = False
    complete: bool = False
    calls_of_graphs: dict[int, Call] = field(default_factory=dict)

    @property
    def half_done(self) -> bool:
        """Whether its backward pass broke off, or is under way."""
        return self.reached and not self.complete

    def reach(self) -> None:
        """A layer's backward has begun. A pass that breaks off (out of memory) never becomes complete."""
        if not self.reached:
            self.reached = True
            Variable._execution_engine.queue_callback(self._finish)

    def _finish(self) -> None:
        self.complete = True

    def norms_of_samples(self, like: Tensor) -> Tensor:
        """The norms ``[P, N]``, 0 where there are none.

        Args:
            like: a ``[P]`` tensor of the dtype and device that the result is to have.
        """
        none = like.new_zeros(self.info.size)
        return torch.stack([self.norms.get(place, none).to(like) for place in range(len(like))])

    def record(self, layer: int, w: Tensor, rho: Tensor) -> None:
        """Keep one layer's coefficients until the optimizer's step."""
        if self.fresh is None or self.rho is None:
            self.fresh = w.new_ones(self.layers, self.info.size)
            self.rho = w.new_full((self.layers,), torch.nan)
        self.fresh[layer] = w
        self.rho[layer] = rho


@dataclass(eq=False)
class LayerSlot:
    """One preconditioned layer: its place among the L layers, and what backward needs to know.

    Attributes:
        layer: index in [0, L).
        name: the module's name in the model.
        kernel: the conversions of its type.
        policy: the model's sharing policy.
        damping: alpha of Eq. 14.
        memory_budget: bytes, of the temporary memory of a coefficient step.
        preconditioned: whether it was preconditioned at least once.
        fallbacks: the reasons for which it got a plain gradient at least once.
        repeated: whether a backward pass found a call that forward did not count; plain from then on.
        used_elsewhere: whether its weight is used outside of its forward as well; plain then.
        batch_first: whether the first dimension of its input is the batch; None as long as no input told.
        seen: the last micro-batch whose backward reached it.
    """

    layer: int
    name: str
    kernel: LayerKernel
    policy: SharingPolicy
    damping: float
    memory_budget: int
    preconditioned: bool = False
    fallbacks: set[str] = field(default_factory=set)
    repeated: bool = False
    used_elsewhere: bool = False
    batch_first: bool | None = None
    seen: MicroBatch | None = None

    def weights(self, x: Tensor, g: Tensor, has_bias: bool, batch: MicroBatch) -> Tensor | None:
        """The weights ``[N]`` for this layer and micro-batch, None for ones.

        Args:
            x: the layer's input, ``[N, ..., i]``.
            g: its output gradient, ``[N T, o]``.
            has_bias: whether a trained bias belongs to h_n.
            batch: the micro-batch of the forward pass.
        """
        batch.reach()
        if reason := self._obstacle(x.shape, batch):
            self.fallbacks.add(reason)
            return None
        self.preconditioned = True
        samples = batch.info.size
        a, g = self.kernel.canonical(x, samples), self.kernel.canonical(g, samples)
        norms = sample_norms(a, g, bias=has_bias) if self.policy.needs_norms else None
        if norms is not None:
            batch.norms[self.layer] = norms
        own = self.policy.weigh(norms, self.layer)
        if own is not None:
            batch.weighed[self.layer] = own
        if not batch.computes:
            if own is None and batch.stored is not None:
                return self.policy.decode(batch.stored[self.layer].to(x.device), norms)
            return own
        with torch.autocast(a.device.type, enabled=False):
            dtype = accumulation_dtype(a.dtype)
            a, g = self.policy.reduce(a.to(dtype), g.to(dtype))
            k = gram(a, normalize(g), bias=has_bias, memory_budget=self.memory_budget)
            w, rho = self.policy.solve(k, self.damping) if own is None else with_weights(k, own)
        batch.record(self.layer, self.policy.encode(w, norms), rho)
        return w

    def _obstacle(self, shape: torch.Size, batch: MicroBatch) -> str | None:
        if self.used_elsewhere:
            return USED_ELSEWHERE
        if batch.calls[self.layer] > 1:
            return CALLED_AGAIN
        if self.repeated or self.seen is batch:
            # Not among the counted calls: reentrant checkpointing runs the first ones without gradients.
            self.repeated = True
            return CALLED_AGAIN
        self.seen = batch
        self.batch_first, reason = layout(self.batch_first, shape, batch.info.size)
        if self.batch_first:
            self.fallbacks.discard(AMBIGUOUS)
        return reason


@dataclass(eq=False)
class LayerCall:
    """One call of a preconditioned layer, from its forward to the end of its backward.

    Attributes:
        slot: the layer.
        batch: the micro-batch that the model was called with; None where it is not known any more, or needed.
    """

    slot: LayerSlot
    batch: MicroBatch | None
    _weights: Tensor | None = None
    _weighed: bool = False

    @property
    def kernel(self) -> LayerKernel:
        """The conversions of the layer's type."""
        return self.slot.kernel

    def gradients(self, x: Tensor, g: Tensor, has_bias: bool) -> tuple[Tensor, Tensor | None]:
        """The weighted sums for weight and bias.

        Args:
            x: the layer's input, ``[N, ..., i]``.
            g: its output gradient, ``[N T, o]``.
            has_bias: whether the bias is trained.

        Returns:
            ``sum_n w_n h_n`` in the layout of the layer's weight, and its bias column ``[o]``, or None.
        """
        if not self._weighed:  # a retained graph runs backward again, with the same weights
            self._weights = None if self.batch is None else self.slot.weights(x, g, has_bias, self.batch)
            self._weighed, self.batch = True, None
        w = self._weights
        samples = 1 if w is None else w.shape[0]
        a, g = self.slot.kernel.canonical(x, samples), self.slot.kernel.canonical(g, samples)
        return self.slot.kernel.weighted_gradient(a, g, w), weighted_bias_sum(g, w) if has_bias else None


def layout(known: bool | None, shape: torch.Size, samples: int) -> tuple[bool | None, str | None]:
    """Whether the first dimension of a tensor is the batch, and the reason for which it can not be weighed.

    Args:
        known: what earlier tensors at the same place told; None for nothing.
        shape: the tensor's.
        samples: the batch's number of them, N.
    """
    if len(shape) < 2 or shape[0] != samples or samples == 0:
        known = False
    elif known is None:
        if samples == 1:
            return None, None  # all of it is that sample's
        if samples in shape[1:-1]:
            return None, AMBIGUOUS
        known = True
    return known, None if known else NOT_THE_BATCH


class Call(Protocol):
    """What the Function needs of a call: `LayerCall`, or that of a tied head (`hf_fngd.rest`)."""

    @property
    def kernel(self) -> LayerKernel:
        """The conversions of the layer's type."""

    def gradients(self, x: Tensor, g: Tensor, has_bias: bool) -> tuple[Tensor, Tensor | None]:
        """The weighted sums for weight and bias."""


class PreconditionedFunction(torch.autograd.Function):
    """A layer whose weight gradient is the weighted sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
        """The layer's own forward, flattened to ``[N T, o]``."""
        ctx.save_for_backward(x, weight)
        ctx.call = call
        return call.kernel.forward(x.reshape(-1, x.shape[-1]), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = ctx.call.kernel.input_gradient(g, weight).view(x.shape) if needs_x else None
        if x.numel() == 0 or not needs_weight:
            zero = torch.zeros_like(weight) if needs_weight else None
            return grad_x, zero, g.sum(0) if needs_bias else None, None
        return grad_x, *ctx.call.gradients(x, g, needs_bias), None


def operands(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a layer computes with, input, weight and bias, cast as autocast would.

    Outside the Function, where autograd casts the gradients back.
    """
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x, weight = _autocast(x), _autocast(weight)
        bias = None if bias is None else _autocast(bias)
    return x, weight, bias


def call_layer(module: nn.Module, x: Tensor, slot: LayerSlot, batch: MicroBatch) -> Tensor:
    """Run an attached layer in a training forward pass."""
    # A recomputation under activation checkpointing runs inside a backward pass and is no call of its own.
    if not in_backward():
        batch.calls[slot.layer] += 1
    output: Tensor = PreconditionedFunction.apply(*operands(module, x), LayerCall(slot, batch))  # type: ignore[no-untyped-call]
    # Not inside the Function, whose output must be no view where a model changes it in place.
    return output.view(*x.shape[:-1], output.shape[-1])


def _autocast(x: Tensor) -> Tensor:
    # As autocast itself does, which leaves float64 alone.
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(x.device.type))
