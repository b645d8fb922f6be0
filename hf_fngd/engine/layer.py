"""One attached layer: whether its samples can be weighed, and its sample weights in a backward pass."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from hf_fngd.distributed.sharded import local
from hf_fngd.engine.attach import unsupported
from hf_fngd.engine.reasons import CALLED_AGAIN, NEVER_CALLED, NOT_ITS_ROWS, PASSED_BY, USED_ELSEWHERE
from hf_fngd.engine.window import MicroBatch
from hf_fngd.layers.base import AMBIGUOUS, LayerKernel, MatrixKernel
from hf_fngd.layers.modules import is_frozen, weight_of
from hf_fngd.layers.select import Selected
from hf_fngd.samples.rows import NO_EQUAL_SHARES, NOT_THE_BATCH, Rows, Shares, View


@dataclass(eq=False)
class Shared:
    """What layers with the same weight share."""

    first: int  # the place of the first of them
    layers: int = 0  # how many layers there are
    reasons: set[str] = field(default_factory=set)  # why the gradient was plain in at least one call
    ambiguous: set[int] = field(default_factory=set)  # places of layers that no batch has shown the batch dimension yet
    reached: bool = False  # whether backward reached one of the layers in this step
    ever: bool = False  # whether it did in any step
    unreached: int = 0  # how many steps reached none of the layers
    passed_by: bool = False  # whether the weight had a gradient in such a step all the same


@dataclass(eq=False)
class Layer:
    """A layer whose training forward passes go through the engine."""

    place: int  # among the attached layers
    selected: Selected
    shared: Shared  # once one call of a shared weight is plain, all later calls are
    solves: bool  # whether the sharing policy solves for sample weights; a layer called twice has none then
    batch_first: bool | None = None  # whether dimension 0 of its input is the batch; None: not known yet
    weighed: bool = False  # whether its samples were ever weighed
    by_sizes: bool = False  # whether in any call the sizes of tensors alone told the samples
    probed: int | None = None  # how often a probe saw it called; None: no probe told
    clips_all: bool = False  # whether it weighs the gradient of its input too, for layers before a BatchNorm
    differentiated: bool = False  # whether the gradient of its input can be differentiated, by its weight as well
    repeated: bool = False  # whether backward found a call that forward did not count
    seen: MicroBatch | None = None  # the last micro-batch whose backward reached it
    view: View | None = None  # where the samples are, by the probe; None: by the sizes of tensors
    unfit: str | None = None  # why the samples of its input cannot be told apart, if the probe found so
    left_out: bool = False  # whether it stays plain, whatever a probe says
    shares: Shares | None = None  # if the view has several rows for each sample
    dim: int = 0  # the view's; a compiled graph depends on nothing else of it

    def __post_init__(self) -> None:
        self.kernel: LayerKernel = self.selected.kernel

    @property
    def reasons(self) -> list[str]:
        """Why the gradient of its weight was plain in some call, sorted; empty if it never was."""
        passed_by = PASSED_BY if self.weighed else NEVER_CALLED
        return sorted(self._obstacles) or [passed_by] * self.shared.passed_by

    @property
    def _obstacles(self) -> set[str]:
        if not (self.shared.reasons or self.shared.ambiguous or self.kernel.fault):  # the common case, in no time
            return set()
        own = [AMBIGUOUS] if self.shared.ambiguous else []
        return {*self.shared.reasons, *own, *([self.kernel.fault] if self.kernel.fault else [])}

    def told(self, verdict: View | str | None) -> None:
        """Take the probe's verdict on the layer; None means that the whole batch shares its input."""
        if self.view is not None or self.left_out:
            return
        finds = self.kernel.finds_samples
        if isinstance(verdict, View) and (self.kernel.by_rows or not finds):
            # The report keeps the reasons of earlier batches.
            self.view = verdict if verdict.row_is_sample or self.kernel.folds(verdict.dim) else None
            self.unfit, self.dim = (None, self.view.dim) if self.view else (NOT_THE_BATCH, 0)
            self.by_sizes = False
        elif not finds or not (verdict is None or (isinstance(verdict, View) and verdict.row_is_sample)):
            self.unfit = verdict if isinstance(verdict, str) else NOT_THE_BATCH

    def leave_out(self, reason: str) -> None:
        """Keep the plain gradient from now on, whatever a probe says."""
        self.view, self.unfit, self.left_out = None, reason, True
        self.shared.reasons.add(reason)

    def follow(self, y: Any, reason: str | None) -> Any:
        """Watch the output of a call that is not weighed (None: nor in a training pass): does it bring a gradient?"""
        weight = weight_of(self.selected.module)
        if not (isinstance(y, Tensor) and y.requires_grad and weight is not None and weight.requires_grad):
            return y
        node, shared = get_gradient_edge(weight).node, self.shared

        def reached(_: Tensor) -> None:
            try:
                asked = torch._C._will_engine_execute_node(node)
            except RuntimeError:  # torch.autograd.grad asks for a leaf
                asked = True
            if asked and reason is not None and not shared.reasons:
                shared.reasons.add(reason)
            shared.passed_by = shared.passed_by or asked

        y.register_hook(reached)  # type: ignore[no-untyped-call]
        return y

    def close(self) -> None:
        """At an optimizer step: find out whether the weight has a gradient that this layer's backward did not make."""
        shared = self.shared
        if shared.reached or shared.passed_by or self.place != shared.first or self._obstacles:
            return
        if is_frozen(self.selected.module):
            return
        shared.unreached += 1
        if shared.unreached.bit_count() == 1:  # in step 1, 2, 4, ..., since the host has to wait for the device
            weight = weight_of(self.selected.module)
            grad = weight.grad if weight is not None and weight.is_leaf else None
            # A zero gradient is that of an unused layer, or of a loader that initializes the optimizer's state.
            shared.passed_by = grad is not None and bool(local(grad).any())

    def locate(self, x: Tensor, batch: MicroBatch) -> tuple[Rows | None, str | None]:
        """Which sample each row of a call's input belongs to, and why that cannot be told (None: it can).

        The first is None where the sizes of tensors have to tell.
        """
        if self.unfit is not None:
            return None, self.unfit
        if batch.ids is None:
            if self.view is None or self.view.row_is_sample or batch.size == 0:
                return self.view, None
            view, dim = self.view, self.view.dim
            if x.dim() <= dim or (dim and x.shape[dim] != batch.size):
                return view, NOT_THE_BATCH
            return view, self._misfit(view, x.shape[: dim + 1].numel(), batch)
        shape = x.shape[:-1] if self.kernel.folds(1) else x.shape[:1]
        if self.kernel.of_ids:
            shape = x.shape
            if len(x) == 1 < batch.rows:
                if not self.kernel.expands:
                    return None, None
                shape = torch.Size((batch.rows, *x.shape[1:]))
        if self.view is None and batch.ids.of.dim() == 1 and batch.rows in shape[1:] and batch.rows > 1:
            return None, AMBIGUOUS
        found = batch.ids.locate(shape, self.view)
        if found is None or not (self.kernel.folds(found.dim) or (found.dim == 0 and len(found.ids) == batch.rows)):
            return None, NOT_ITS_ROWS
        return found, None

    def weights(
        self,
        x: Tensor | None,
        g: Tensor,
        has_bias: bool,
        batch: MicroBatch,
        again: bool,
        rows: Rows | None,
        kernel: LayerKernel | None = None,
    ) -> Tensor | None:
        """The sample weights of one call in a backward pass, None for ones.

        Args:
            x: the input, as the kernel takes it.
            g: the output gradient, as the kernel takes it.
            has_bias: whether a trained bias belongs to h_n.
            batch: the micro-batch.
            again: whether this is a further backward pass of a retained graph. It gets sample weights of its own, which
                are not kept.
            rows: which sample each row belongs to.
            kernel: that of the call; None for that of the last call.

        Returns:
            One weight for each sample ``[N]``; where ``rows`` are given, one for each row ``[R]``.
        """
        self.reach(batch)
        if batch.multiplications is not None and self.selected.preconditioned:
            batch.multiplications += self._multiplications(x, g)
        count = (g if x is None else x).shape[0]
        told = rows is not None or (count == batch.size and batch.ids is None)
        if batch.size == 0 or self._is_plain(x, g, batch, again, rows) or not told:
            return None
        self.weighed = True
        unseen = rows is None or (self.probed is not None and batch.calls[self.place] > self.probed)
        self.by_sizes = self.by_sizes or (unseen and batch.size > 1 and not self.kernel.finds_samples)
        weights = batch.make_weights() if again or batch.weights is None else batch.weights
        w = weights.weigh(self.place, _Samples(kernel or self.kernel, x, g, has_bias, rows, batch.size))
        return w if w is None or rows is None else rows.of_rows(w, count)

    def reach(self, batch: MicroBatch) -> None:
        """A backward pass has reached a call in this micro-batch."""
        batch.reach()
        self.shared.reached = self.shared.ever = True

    def _multiplications(self, x: Tensor | None, g: Tensor) -> int:
        weight = weight_of(self.selected.module)
        assert isinstance(self.kernel, MatrixKernel)
        assert x is not None
        return 0 if weight is None else self.kernel.multiplications(x, g, weight)

    def _is_plain(self, x: Tensor | None, g: Tensor, batch: MicroBatch, again: bool, rows: Rows | None) -> bool:
        """Whether this call gets a plain gradient; the reason goes to `Shared`."""
        reason: str | None = self.unfit  # a probe may have found it after this graph was compiled
        if reason is not None:
            pass
        elif rows is None:
            self.batch_first, reason = self.kernel.layout(self.batch_first, x, g, batch.rows)
            if batch.ids is not None and reason is None and (g if x is None else x).shape[0] == batch.rows:
                reason = NOT_ITS_ROWS
        else:
            reason = self._misfit(rows, (g if x is None else x).shape[0], batch)
            if reason is None and rows.row_is_sample and batch.size > 1:
                self.batch_first = True  # compiled graphs and checkpoints go by it
            self.shared.ambiguous.discard(self.place)
        if self.solves and self._called_again(batch, again):
            reason = CALLED_AGAIN
        if self.batch_first is not None:
            self.shared.ambiguous.discard(self.place)
        if reason == AMBIGUOUS:
            self.shared.ambiguous.add(self.place)
        elif reason is not None:
            self.shared.reasons.add(reason)
        if self.shared.layers > 1:
            return bool(self._obstacles)
        return reason is not None or USED_ELSEWHERE in self.shared.reasons

    def _misfit(self, rows: Rows, count: int, batch: MicroBatch) -> str | None:
        """Why a call with ``count`` rows contradicts ``rows``, or None; unequal shares make the layer unfit."""
        fits = rows.fits(count, batch.size)
        if rows is not self.view or self.shares is None:
            return None if fits else NOT_THE_BATCH
        if not (fits and self.shares.allow(count // batch.size, batch.sizes)):
            self.leave_out(NO_EQUAL_SHARES)  # the samples had equal shares in the probe's batch only
        return self.unfit

    def _called_again(self, batch: MicroBatch, again: bool) -> bool:
        if batch.calls[self.place] <= 1 and not self.repeated and (again or self.seen is not batch):
            self.seen = batch
            return False
        # The count may miss calls: reentrant checkpointing runs the first ones without gradients.
        self.repeated = self.repeated or batch.calls[self.place] <= 1
        return True

    def state(self) -> list[Any]:
        """What a checkpoint keeps of the layer."""
        own = [AMBIGUOUS] if self.place in self.shared.ambiguous else []
        return [self.batch_first, sorted([*self.shared.reasons, *own]), self.repeated, self.kernel.expands]

    def load_state(self, state: Sequence[Any]) -> None:
        """The inverse of `state`."""
        self.batch_first, reasons, self.repeated, expands = state
        self.shared.reasons.update(set(reasons) - {AMBIGUOUS})
        self.shared.ambiguous.update([self.place] if AMBIGUOUS in reasons else [])
        if NO_EQUAL_SHARES in reasons:
            self.leave_out(NO_EQUAL_SHARES)
        if self.kernel.expands != expands:  # a table's; other kernels cannot be set
            self.kernel.expands = expands


def attached_layers(selected: Sequence[Selected], solves: bool) -> list[Layer]:
    """The layers of a selection, in its order."""
    shared: dict[int, Shared] = {}
    layers = []
    for place, one in enumerate(selected):
        of_weight = shared.setdefault(id(weight_of(one.module)), Shared(place))
        of_weight.layers += 1
        layers.append(Layer(place, one, of_weight, solves))
    return layers


@dataclass(slots=True)
class _Samples:
    """One call's samples, as a policy asks about them (`hf_fngd.weights.base.Samples`)."""

    kernel: LayerKernel
    x: Tensor | None
    g: Tensor
    has_bias: bool
    rows: Rows | None
    size: int

    def norms(self) -> Tensor:
        try:
            norms = self.kernel.norms(self.x, self.g, self.has_bias)
        except RuntimeError as error:
            if "Batching rule" not in str(error):
                raise
            raise unsupported("torch.autograd.grad(..., is_grads_batched=True)") from error
        return norms if self.rows is None else self.rows.of_samples(norms, self.size, self.kernel.adds)

    def gram(self, memory_budget: int) -> Tensor:
        assert isinstance(self.kernel, MatrixKernel)
        assert self.x is not None
        x, g, count = self.x, self.g, len(self.x)
        if self.rows is not None:
            x, g = (self.rows.samples_first(one, self.size, count) for one in (x, g))
        return self.kernel.gram(x, g, self.has_bias, memory_budget)
