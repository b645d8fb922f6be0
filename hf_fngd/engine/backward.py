"""One call of a layer, from its forward to the end of its backward, both eager and in compiled graphs.

``p.grad`` *is* the weighted sum when backward returns, so whatever acts on it (clipping, loss scaling, accumulation,
all-reduce) works unchanged. The batch-mean gradient is never computed, and no per-sample gradient is kept.

A compiled graph keeps no Python objects, and an integer that changes from step to step would recompile it. So a
micro-batch travels through the graph as a number in a tensor. `begin` numbers the forward pass, `sample_weights` finds
the micro-batch by that number in backward, and the compiler looks into neither. A compiled graph does not count the
calls of a layer (a compiler moves to backward what only backward reads). Whatever needs an eager pass is found by
`hf_fngd.engine.rehearsal`.
"""

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, library

from hf_fngd.engine.layer import Layer
from hf_fngd.engine.rehearsal import Rehearsal, unpacked
from hf_fngd.engine.window import MicroBatch
from hf_fngd.layers.base import LayerKernel, Saved
from hf_fngd.samples.ids import Ids, of_tokens, read_ids
from hf_fngd.samples.rows import NOT_THE_BATCH, Rows
from hf_fngd.weights.algebra import scaled

# In a CUDA graph the operators would not run again: each step would get the sample weights of the captured one. A torch
# without the tag captures no operator that takes a CPU tensor, and the micro-batch's number is one.
_TAGS: Any = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
_numbers = itertools.count()
_engines: "weakref.WeakValueDictionary[int, GraphHandle]" = weakref.WeakValueDictionary()
# A window keeps them alive until the optimizer step.
_batches: weakref.WeakValueDictionary[int, MicroBatch] = weakref.WeakValueDictionary()


class GraphHandle:
    """A preconditioner as a compiled graph knows it: a number, by which the operators find its layers."""

    def __init__(self, layers: list[Layer], begin: Callable[[int, Ids | None, Rehearsal], MicroBatch]) -> None:
        self.layers, self.begin = layers, begin
        self.number = next(_numbers)
        _engines[self.number] = self


def numbered(batch: MicroBatch) -> Tensor:
    """Give a micro-batch a number by which the operators find it, an int64 scalar on the CPU."""
    number = next(_numbers)
    _batches[number] = batch
    return torch.tensor(number, device="cpu")


@library.custom_op("hf_fngd::begin", mutates_args=(), **_TAGS)
def begin(
    sample: Tensor,
    engine: int,
    by: str,
    ids: list[Tensor],
    text: str,
    tensors: list[Tensor],
    integers: list[int],
    autocast: torch.dtype | None,
) -> Tensor:
    """Begin a forward pass on a batch with the rows of ``sample``; returns the micro-batch's number.

    ``by`` and ``ids`` are what `find_ids` returned; an empty string and list where it found no ids. The other
    arguments are for a rehearsal: what `packed` made of the model's arguments, and autocast's dtype (None: off).
    """
    found = read_ids(by, ids, sample) if by else None
    rehearsal = Rehearsal(unpacked(text, tensors, integers), autocast, sample.device.type)
    batch = _engines[engine].begin(sample.shape[0] if found is None else found.samples, found, rehearsal)
    batch.tokens = bool(by) and of_tokens(by, ids, sample)
    return numbered(batch)


@begin.register_fake
def _(sample: Tensor, *_: Any) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


@library.custom_op("hf_fngd::sample_weights", mutates_args=(), **_TAGS)
def sample_weights(
    x: Tensor | None, g: Tensor, batch: Tensor, engine: int, place: int, has_bias: bool, dim: int
) -> Tensor:
    """`Layer.weights`, and ones where that is None. The rows of x and g are their dimensions up to ``dim`` in one."""
    # None where this backward pass comes after the optimizer step: too late to weigh anything.
    found = _batches.get(int(batch)) if g.numel() else None
    w = None
    if found is not None:
        again = found.complete and place in found.of_graphs
        layer, rows = _engines[engine].layers[place], found.traced((g if x is None else x).shape[0])
        told = None if found.ids is not None or rows is not None else layer.view
        if told is None or told.row_is_sample or (layer.kernel.by_rows and told.dim == dim):
            w = layer.weights(x, g, has_bias, found, again, rows or told)
        else:
            layer.reach(found)
            if not layer.kernel.by_rows:
                layer.shared.reasons.add(NOT_THE_BATCH)
            # else the probe ran after this graph was compiled; the next batch recompiles it
        found.of_graphs.add(place)
    return g.new_ones((g if x is None else x).shape[0]) if w is None else w.to(g.dtype, copy=True)


@sample_weights.register_fake
def _(x: Tensor | None, g: Tensor, *_: Any) -> Tensor:
    return g.new_empty((g if x is None else x).shape[0])


@library.custom_op("hf_fngd::passed_on", mutates_args=(), **_TAGS)
def passed_on(w: Tensor, engine: int, place: int) -> Tensor:
    """The sample weights that a layer puts on the gradient of its input: ``w``, or ones (`Layer.clips_all`)."""
    return w.clone() if _engines[engine].layers[place].clips_all else torch.ones_like(w)


@passed_on.register_fake
def _(w: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(w)


@dataclass(slots=True)
class LayerCall:
    """What the engine offers a kernel for one call of its layer (`hf_fngd.layers.base.Call`)."""

    layer: Layer | LayerKernel  # in a compiled graph the kernel alone
    place: int
    batch: MicroBatch | Tensor  # in a compiled graph the number that `begin` returned
    engine: int  # its number
    rows: Rows | None = None  # where the samples are; None: neither a probe nor ids said
    rehearsed: bool = False  # see `Call`
    may_pass_on: bool = False  # whether in a compiled graph its sample weights may go on to its input's gradient

    @property
    def samples(self) -> int | None:
        """See `Call`."""
        return None if isinstance(self.batch, Tensor) else self.batch.size

    @property
    def batch_rows(self) -> int | None:
        """See `Call`."""
        return None if isinstance(self.batch, Tensor) else self.batch.rows

    def take(self, kernel: LayerKernel) -> None:
        """See `Call`."""
        if isinstance(self.layer, Layer):
            self.layer.kernel = kernel
        else:
            self.layer = kernel

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        number = self.batch if isinstance(self.batch, Tensor) else None
        dim = 0 if self.rows is None else self.rows.dim
        rows = x.flatten(0, dim)
        # Views, not leaves: autograd does not say of a leaf whether a pass of autograd.grad asks for it.
        views = weight.view_as(weight), None if bias is None else bias.view_as(bias)
        y: Tensor = WeighedLayer.apply(rows, *views, number, self)  # type: ignore
        return y.view(*x.shape[: dim + 1], *y.shape[1:]) if dim and y.shape[:-1] == rows.shape[:-1] else y

    def weigh(self, y: Tensor, like: Tensor | None = None) -> Tensor:
        """See `Call.weigh`. Returns a copy, so that a model may change it in place."""
        number = self.batch if isinstance(self.batch, Tensor) else None
        dim = 0 if self.rows is None else self.rows.dim
        weighed: Tensor = WeighedTensor.apply(y.flatten(0, dim), like, number, self)  # type: ignore
        return weighed.view(y.shape) if dim else weighed

    def remember(self, ctx: Any) -> None:
        """Keep for backward what it needs beside tensors."""
        # Not as a saved tensor: checkpointing would replace the micro-batch's number by that of its last forward.
        ctx.batch = None if isinstance(self.batch, Tensor) else self.batch
        ctx.layer, ctx.engine, ctx.place, ctx.again = self.layer, self.engine, self.place, False
        ctx.may_pass_on = self.may_pass_on
        ctx.rows, ctx.kernel = self.rows, self.layer.kernel if isinstance(self.layer, Layer) else self.layer


def _weights(ctx: Any, x: Tensor | None, g: Tensor, number: Tensor | None, has_bias: bool) -> Tensor | None:
    """The sample weights of one call in one backward pass; each pass of a retained graph has its own."""
    if torch.is_grad_enabled():  # for a second derivative they are constants
        with torch.no_grad():
            return _weights(ctx, x, g, number, has_bias)
    if number is not None:
        dim = 0 if ctx.rows is None else ctx.rows.dim
        w: Tensor = sample_weights(x, g, number, ctx.engine, ctx.place, has_bias, dim)
        return w
    again, ctx.again = ctx.again, True
    layer: Layer = ctx.layer
    return layer.weights(x, g, has_bias, ctx.batch, again, ctx.rows, ctx.kernel) if g.numel() else None


class WeighedLayer(torch.autograd.Function):
    """A layer whose kernel owns forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, number: Tensor | None, call: Any) -> Tensor:
        """`ExplicitKernel.forward`; ``number`` is the micro-batch's in a compiled graph, None elsewhere."""
        call.remember(ctx)
        y, others = ctx.kernel.forward(x, weight, bias)
        ctx.save_for_backward(x, weight, number, *others)
        ctx.has_bias = bias is not None and bias.requires_grad
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias; of weight and bias only in a pass that asks for them."""
        x, weight, number, *others = ctx.saved_tensors
        saved, has_bias = Saved(x, weight, tuple(others)), ctx.has_bias
        of_weight: tuple[Tensor | None, Tensor | None] = None, None
        edges = ctx.next_functions[1 : 2 + has_bias]
        asked = number is not None or any(torch._C._will_engine_execute_node(edge) for edge, _ in edges)
        clips_all = number is None and ctx.layer.clips_all and not ctx.batch.leads_on
        if asked or clips_all:
            w = _weights(ctx, x, g, number, has_bias)
        if clips_all:
            g, w = scaled(g, w), None
        if asked:
            of_weight = ctx.kernel.weighted_gradient(saved, g, w, has_bias)
            if number is not None and ctx.may_pass_on:
                g = scaled(g, passed_on(w, ctx.engine, ctx.place))
        if number is None and torch.is_grad_enabled() and ctx.needs_input_grad[0] and weight.requires_grad:
            ctx.layer.differentiated = True
        # Last, so that the norms are taken while g is in the cache.
        return ctx.kernel.input_gradient(saved, g) if ctx.needs_input_grad[0] else None, *of_weight, None, None


class WeighedTensor(torch.autograd.Function):
    """A tensor whose gradient is multiplied by the sample weights."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, like: Tensor | None, number: Tensor | None, call: Any) -> Tensor:
        """A copy."""
        ctx.save_for_backward(like, number)
        call.remember(ctx)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of y."""
        like, number = ctx.saved_tensors
        return scaled(g, _weights(ctx, like, g, number, False)), None, None, None
