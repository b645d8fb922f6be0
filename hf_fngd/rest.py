"""Embeddings, tied heads and first convolutions, which have no Gram matrix: their samples are weighed all the same.

With ``weigh_rest`` they share the weights of the preconditioned layers, as the paper has the layers of a block share
one Gram matrix (Fig. 3): a sample's weight there is the mean over the layers of those that the sharing policy keeps, so
that a sample that is small in the layers is small here too. Where the norms of each batch tell the weights, those of
the module's own output gradients do. A weight that several modules share (a head that is tied to an embedding) is
weighed in all of its uses or in none. A convolution is weighed where its input needs no gradient (that of pixels or
sound), which the weights would change. Norms stay plain.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hf_fngd.backward import AMBIGUOUS, USED_ELSEWHERE, MicroBatch, PreconditionedFunction, layout, operands
from hf_fngd.layers import LayerKernel
from hf_fngd.persample import accumulation_dtype, weighted_bias_sum
from hf_fngd.selection import SelectedRest, is_convolution
from hf_fngd.sharing import SharingPolicy

A_TABLE = "its output has two dimensions, as that of a table of positions has"
INPUT_HAS_GRADIENT = "its input needs a gradient, which weights would change"


@dataclass(eq=False)
class RestSlot:
    """An embedding, a convolution, or a Linear or Conv1D whose weight is tied.

    Attributes:
        place: index among these, counted on from the preconditioned layers.
        name: the module's name in the model.
        module: the module.
        kernel: the conversions of a Linear or Conv1D, None for an embedding or a convolution.
        policy: the model's sharing policy.
        fallbacks: the reasons for which the weight is plain for good, whichever of its uses they are about.
        ambiguous: the places of those of its uses that wait for a batch to tell which dimension is the batch's.
        batch_first: whether the first dimension of its output is the batch; None as long as no output told.
        reached: whether a gradient of its output was to be weighed.
    """

    place: int
    name: str
    module: nn.Module
    kernel: LayerKernel | None
    policy: SharingPolicy
    fallbacks: set[str]
    ambiguous: set[int]
    batch_first: bool | None = None
    reached: bool = False

    @property
    def reasons(self) -> list[str]:
        """Why the weight is plain, sorted; nothing where it is weighed."""
        return sorted({*self.fallbacks, *([AMBIGUOUS] if self.ambiguous else [])})

    @property
    def convolves(self) -> bool:
        """Whether the module is a convolution."""
        return self.kernel is None and not isinstance(self.module, nn.Embedding)

    def takes(self, x: Tensor) -> bool:
        """Whether the samples can be weighed in the gradient of the output that belongs to an input."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return not self.convolves or (not x.requires_grad and x.dim() == weight.dim())

    def input_norms(self, x: Tensor) -> Tensor | None:
        """The norms ``[N]`` of a convolution's inputs, where the policy goes by norms; None for ones."""
        if not self.convolves or not self.policy.needs_norms:
            return None
        norms: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=accumulation_dtype(x.dtype))
        return norms

    def state(self) -> list[Any]:
        """What a checkpoint keeps of the module: `batch_first`, and the reasons in one string."""
        own = [AMBIGUOUS] if self.place in self.ambiguous else []
        return [self.batch_first, "; ".join(sorted([*self.fallbacks, *own]))]

    def load_state(self, state: Sequence[Any]) -> None:
        """The inverse of `state`."""
        self.batch_first, joined = state
        reasons = set(filter(None, joined.split("; ")))
        if AMBIGUOUS in reasons:
            self.ambiguous.add(self.place)
        self.fallbacks.update(reasons - {AMBIGUOUS})

    def weights(self, g: Tensor, batch: MicroBatch, input_norms: Tensor | None) -> Tensor | None:
        """The weights ``[N]`` of a micro-batch's samples; None for ones, as long as the policy has none.

        Args:
            g: the module's output gradient ``[N, ..., o]``. Its norms stand for those of h_n where the policy goes by
                them: the inputs of an embedding are rows of the identity, those of a head as a rule normalized.
            batch: the micro-batch of the forward pass.
            input_norms: what they are multiplied by ``[N]``.
        """
        self.reached = True
        if batch.info.size == 0:
            return None
        self.batch_first, reason = layout(self.batch_first, g.shape, batch.info.size)
        if isinstance(self.module, nn.Embedding) and g.dim() == 2:
            self.batch_first, reason = False, A_TABLE
        if self.batch_first is not None:
            self.ambiguous.discard(self.place)
        if reason == AMBIGUOUS:
            self.ambiguous.add(self.place)
        elif reason is not None:
            self.fallbacks.add(reason)
        if self.fallbacks or self.ambiguous or len(g) != batch.info.size:
            return None
        norms = None
        if self.policy.needs_norms:
            norms = torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=accumulation_dtype(g.dtype))
            norms = norms if input_norms is None else norms * input_norms
            # Of one that is called twice no norms are remembered: each call has its own.
            batch.norms[self.place] = torch.zeros_like(norms) if self.place in batch.norms else norms
        own = self.policy.weigh(norms, self.place)
        if own is None and batch.mean is not None:
            return self.policy.decode(batch.mean.to(g.device), norms)
        return own


def rest_slots(selected: Sequence[SelectedRest], first: int, policy: SharingPolicy) -> list[RestSlot]:
    """Slots of the modules, in places from ``first`` on; those that share a weight share the reasons against it."""
    fallbacks: dict[int, set[str]] = defaultdict(set)
    ambiguous: dict[int, set[int]] = defaultdict(set)
    return [
        RestSlot(
            place,
            one.name,
            one.module,
            one.kernel,
            policy,
            fallbacks[id(one.module.weight)],
            ambiguous[id(one.module.weight)],
            batch_first=True if is_convolution(one.module) else None,  # of a batch, which `takes` asks for
        )
        for place, one in enumerate(selected, start=first)
    ]


def inspect_rest(slots: Sequence[RestSlot], uses: Counter[int], batch: MicroBatch) -> None:
    """Find the weights that a forward pass used otherwise than by calling a module.

    Args:
        slots: all of them.
        uses: how many operations of its graph read each leaf, by ``id``.
        batch: the micro-batch, which counted the calls.
    """
    calls = Counter[int]()
    for slot in slots:
        calls[id(slot.module.weight)] += batch.calls[slot.place]
    for slot in slots:
        if uses[id(slot.module.weight)] > calls[id(slot.module.weight)]:
            slot.fallbacks.add(USED_ELSEWHERE)


@dataclass(eq=False)
class RestCall:
    """One call of a module of the rest, from its forward to the end of its backward; see `LayerCall`.

    Attributes:
        slot: the module.
        batch: the micro-batch that the model was called with; None where it is not known any more, or needed.
        input_norms: see `RestSlot.weights`.
    """

    slot: RestSlot
    batch: MicroBatch | None
    input_norms: Tensor | None = None
    _weights: Tensor | None = None

    @property
    def kernel(self) -> LayerKernel:
        """The conversions of the layer's type."""
        assert self.slot.kernel is not None
        return self.slot.kernel

    def weights(self, g: Tensor) -> Tensor | None:
        """Those of the samples, from the output gradient ``[N, ..., o]``; a retained graph has the same again."""
        if self.batch is not None:
            self._weights, self.batch = self.slot.weights(g, self.batch, self.input_norms), None
        return self._weights

    def weigh(self, g: Tensor) -> Tensor:
        """The output gradient of an embedding or a convolution, with each sample's times its weight."""
        w = self.weights(g)
        return g if w is None else g * w.to(g.dtype).view(-1, *[1] * (g.dim() - 1))

    def gradients(self, x: Tensor, g: Tensor, has_bias: bool) -> tuple[Tensor, Tensor | None]:
        """The weighted sums for weight and bias of a Linear or Conv1D, as `LayerCall.gradients`."""
        w = self.weights(g.view(*x.shape[:-1], g.shape[-1]))
        samples = 1 if w is None else len(w)
        a, g = self.kernel.canonical(x, samples), self.kernel.canonical(g, samples)
        return self.kernel.weighted_gradient(a, g, w), weighted_bias_sum(g, w) if has_bias else None


class WeighedFunction(torch.autograd.Function):
    """The identity on the output of an embedding or a convolution; backward weighs the gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, call: RestCall) -> Tensor:
        """The output itself, and no view of it, which models could not change in place."""
        ctx.call = call
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient that the module sums up."""
        return ctx.call.weigh(g), None


def weigh_output(y: Tensor, x: Tensor, slot: RestSlot, batch: MicroBatch) -> Tensor:
    """Hand on the output ``y`` of an embedding or a convolution, called with ``x``, in a training forward pass."""
    y = y.clone() if y._is_view() else y
    call = RestCall(slot, batch, slot.input_norms(x))
    return WeighedFunction.apply(y, call)  # type: ignore[no-any-return, no-untyped-call]


def call_head(slot: RestSlot, x: Tensor, batch: MicroBatch) -> Tensor:
    """Run a Linear or Conv1D whose weight is tied in a training forward pass."""
    call = RestCall(slot, batch)
    output: Tensor = PreconditionedFunction.apply(*operands(slot.module, x), call)  # type: ignore[no-untyped-call]
    return output.view(*x.shape[:-1], output.shape[-1])
