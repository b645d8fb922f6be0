"""What happens to one layer in one forward and one backward pass.

The layer's forward goes through an autograd Function whose backward returns ``sum_n w_n h_n`` in place of the
weight gradient, so that ``p.grad`` *is* the preconditioned gradient when backward returns and whatever acts
on ``p.grad`` (clipping, loss scaling, accumulation, all-reduce) works unchanged. The batch-mean gradient is
never computed, and no per-sample gradient is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hf_fngd.layers import LayerKernel
from hf_fngd.persample import accumulation_dtype, gram, normalize, sample_norms, weighted_bias_sum
from hf_fngd.sharing import BatchInfo, SharingPolicy

NOT_THE_BATCH = "the first dimension of its input is not the batch"
CALLED_AGAIN = "it is called more than once in a forward pass"


@dataclass
class MicroBatch:
    """One forward and backward pass of the model, as its layers see it.

    Attributes:
        info: size, place and dataset indices.
        computes: whether this is a coefficient step.
        stored: weights of a shared step ``[L, N]``; None for w = 1.
        fresh: encoded weights of a coefficient step ``[L, N]``, filled layer by layer.
        rho: the noise ratios that go with them ``[L]``; NaN where a layer measured none.
        calls: how often each layer was called in the forward pass.
        touched: whether a backward pass reached any layer.
    """

    info: BatchInfo
    computes: bool
    stored: Tensor | None
    calls: list[int]
    fresh: Tensor | None = None
    rho: Tensor | None = None
    touched: bool = False

    def record(self, layer: int, w: Tensor, rho: Tensor) -> None:
        """Keep one layer's coefficients until the optimizer's step."""
        if self.fresh is None or self.rho is None:
            layers = len(self.calls)
            self.fresh = w.new_ones(layers, self.info.size)
            self.rho = w.new_full((layers,), torch.nan)
        self.fresh[layer] = w
        self.rho[layer] = rho


@dataclass
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
    seen: MicroBatch | None = None

    def weights(self, x: Tensor, g: Tensor, has_bias: bool, batch: MicroBatch) -> Tensor | None:
        """The weights ``[N]`` for this layer and micro-batch, None for ones.

        Args:
            x: the layer's input, ``[N, ..., i]``.
            g: its output gradient, ``[N, ..., o]``.
            has_bias: whether a trained bias belongs to h_n.
            batch: the micro-batch of the forward pass.
        """
        if reason := self._obstacle(x, batch):
            self.fallbacks.add(reason)
            return None
        self.preconditioned = True
        if not batch.computes and batch.stored is None:
            return None
        samples = batch.info.size
        a, g = self.kernel.canonical(x, samples), self.kernel.canonical(g, samples)
        norms = sample_norms(a, g) if self.policy.needs_norms else None
        if not batch.computes:
            assert batch.stored is not None
            return self.policy.decode(batch.stored[self.layer].to(x.device), norms)
        with torch.autocast(a.device.type, enabled=False):
            k = gram(
                a.to(accumulation_dtype(a.dtype)),
                normalize(g),
                bias=has_bias,
                memory_budget=self.memory_budget,
            )
            w, rho = self.policy.solve(k, self.damping)
        batch.record(self.layer, self.policy.encode(w, norms), rho)
        return w

    def _obstacle(self, x: Tensor, batch: MicroBatch) -> str | None:
        batch.touched = True
        if batch.calls[self.layer] > 1:
            return CALLED_AGAIN
        if self.repeated or self.seen is batch:
            # Not among the counted calls: reentrant checkpointing runs the first ones without gradients.
            self.repeated = True
            return CALLED_AGAIN
        self.seen = batch
        if x.dim() < 2 or x.shape[0] != batch.info.size or batch.info.size == 0:
            return NOT_THE_BATCH
        return None


class PreconditionedFunction(torch.autograd.Function):
    """A layer whose weight gradient is the weighted sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, slot: LayerSlot, batch: MicroBatch) -> Tensor:
        """The layer's own forward."""
        ctx.save_for_backward(x, weight)
        ctx.slot, ctx.batch = slot, batch
        return slot.kernel.forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        slot: LayerSlot = ctx.slot
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_x = slot.kernel.input_gradient(g, weight) if needs_x else None
        if x.numel() == 0 or not needs_weight:
            zero = torch.zeros_like(weight) if needs_weight else None
            return grad_x, zero, g.flatten(0, -2).sum(0) if needs_bias else None, None, None
        if not hasattr(ctx, "weights"):  # a retained graph runs backward again, with the same weights
            ctx.weights = slot.weights(x, g, needs_bias, ctx.batch)
        w = ctx.weights
        samples = 1 if w is None else w.shape[0]
        a, g = slot.kernel.canonical(x, samples), slot.kernel.canonical(g, samples)
        grad_weight = slot.kernel.weighted_gradient(a, g, w)
        grad_bias = weighted_bias_sum(g, w) if needs_bias else None
        return grad_x, grad_weight, grad_bias, None, None


def call_layer(module: nn.Module, x: Tensor, slot: LayerSlot, batch: MicroBatch) -> Tensor:
    """Run an attached layer in a training forward pass."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    # A recomputation under activation checkpointing runs inside a backward pass and is no call of its own.
    if torch._C._current_graph_task_id() == -1:
        batch.calls[slot.layer] += 1
    device = x.device.type
    if torch.is_autocast_enabled(device):
        # Outside the Function, where autograd casts the gradients back.
        x, weight = _autocast(x), _autocast(weight)
        bias = None if bias is None else _autocast(bias)
    output: Tensor = PreconditionedFunction.apply(x, weight, bias, slot, batch)  # type: ignore[no-untyped-call]
    return output


def _autocast(x: Tensor) -> Tensor:
    # As autocast itself does, which leaves float64 alone.
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(x.device.type))
