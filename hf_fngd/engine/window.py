"""The micro-batches of the current optimizer step."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import CheckpointFunction

from hf_fngd.distributed.exchange import rank_and_world
from hf_fngd.distributed.replicas import Wrapped, wrapped
from hf_fngd.samples.ids import Ids
from hf_fngd.samples.rows import Rows, View
from hf_fngd.stack import callers
from hf_fngd.weights.base import MicroBatchWeights

logger = logging.getLogger(__name__)

_LIMIT = 1024
_PATIENCE = 3  # some optimizers (SAM) step, take it back and step again: that alone is no fault


def in_backward() -> bool:
    """Whether this runs inside a backward pass, as a forward pass does that activation checkpointing recomputes."""
    return bool(torch._C._current_graph_task_id() != -1)


def after_backward(call: Callable[[], None]) -> None:
    """Run ``call`` once the current backward pass is over and its micro-batches are complete.

    Raises RuntimeError within reentrant checkpointing, whose inner backward pass ends before the outer one.
    """
    for frame in callers():
        if frame.f_code is CheckpointFunction.backward.__code__:
            raise RuntimeError(
                "an optimizer that FNGD follows stepped inside backward, within layers that reentrant checkpointing "
                "recomputes, where the end of the pass is not known: set use_reentrant=False, or follow none of these "
                "optimizers and call preconditioner.step() after each backward pass"
            )
    queue = Variable._execution_engine.queue_callback
    queue(lambda: queue(call))  # queued twice: it comes after the callbacks of micro-batches yet to be reached


@dataclass(eq=False)
class MicroBatch:
    """One forward and backward pass of the model, as its layers see it."""

    size: int  # the number of samples N
    make_weights: Callable[[], MicroBatchWeights]
    calls: list[int]  # how often each layer was called in the forward pass
    on_backward: Callable[[], Callable[["MicroBatch"], None] | None]  # refers to what is called when that begins
    ids: Ids | None = None  # which sample each row or token belongs to, if the batch says so
    sizes: Mapping[str, frozenset[int]] = field(default_factory=dict)  # of the model's inputs, if a layer has `Shares`
    tokens: bool = False  # whether the rows in a compiled graph are tokens
    leads_on: bool = False  # whether a gradient goes on through the model's inputs, as to a generator
    recomputed: bool = False  # whether the forward pass is a recomputation of the whole model by checkpointing
    multiplications: int | None = None  # in the forwards of its preconditioned layers; None: nobody asks
    wrapped: Wrapped | None = field(default_factory=wrapped)  # by DistributedDataParallel
    reached: bool = False  # whether a backward pass has reached any layer
    complete: bool = False  # whether that backward pass has ended
    of_graphs: set[int] = field(default_factory=set)  # places of layers that a compiled backward pass has reached

    def __post_init__(self) -> None:
        self.weights: MicroBatchWeights | None = self.make_weights()  # until the optimizer step

    def restart(self, make_weights: Callable[[], MicroBatchWeights]) -> None:
        """Begin anew with other sample weights; no layer has been weighed yet."""
        self.make_weights = make_weights
        self.weights = make_weights()

    @property
    def rows(self) -> int:
        """The number of rows of the batch B: N, unless ids say otherwise."""
        return self.size if self.ids is None else self.ids.rows

    def traced(self, rows: int) -> Rows | None:
        """Which sample each of so many rows of a call in a compiled graph belongs to; None where nothing says so."""
        if self.ids is not None:
            return self.ids.locate((rows,), None)
        return View(0, "first") if self.tokens and rows != self.size else None

    def reach(self) -> None:
        """A layer's backward begins. A backward pass that breaks off (out of memory) never completes the batch."""
        if not self.reached:
            self.reached = True
            if (call := self.on_backward()) is not None:
                call(self)
            Variable._execution_engine.queue_callback(self._finish)

    def _finish(self) -> None:
        self.complete = True


class Window:
    """The micro-batches of an optimizer step. Forward passes add to them, and the step closes the window."""

    def __init__(self) -> None:
        self._batches: list[MicroBatch] = []
        self._weight: Tensor | None = None  # a weight of the model: a new version of it means that somebody stepped
        self._version = 0  # its version when the last forward pass ended
        self._wrapped: Wrapped | None = None  # the last pass within DistributedDataParallel
        self.stepped = False  # whether the window was ever closed
        self._passed_by = 0  # how often somebody stepped without closing the window, since it last was closed

    @property
    def begun(self) -> int:
        """How many micro-batches have begun since the last step, in all processes."""
        return rank_and_world()[1] * sum(batch.reached or not batch.recomputed for batch in self._batches)

    @property
    def complete(self) -> bool:
        """Whether the backward pass of any micro-batch since the last step has ended."""
        return any(batch.complete for batch in self._batches)

    @property
    def multiplications(self) -> int:
        """How many the micro-batches since the last step have made."""
        return sum(batch.multiplications or 0 for batch in self._batches if batch.complete)

    @property
    def replicas(self) -> ProcessGroup | None:
        """The processes that take the same step, as the last pass within DistributedDataParallel showed."""
        return None if self._wrapped is None else self._wrapped.replicas

    @property
    def next_offset(self) -> int:
        """How many micro-batches of the step, of all processes, come before this process's next one."""
        return self.begun + rank_and_world()[0]

    def offset_of(self, batch: MicroBatch) -> int:
        """How many micro-batches of the step, of all processes, come before this one."""
        rank, world = rank_and_world()
        before = self._batches[: self._batches.index(batch)]
        return rank + world * sum(one.reached or not one.recomputed for one in before)

    def forget_before(self, batch: MicroBatch) -> bool:
        """Forget the complete micro-batches, but for one whose backward pass begins.

        Returns whether there were any, and that one is of this step.
        """
        complete = [one for one in self._batches if one.complete and one is not batch]
        self._batches = [one for one in self._batches if one not in complete]
        return bool(complete) and batch in self._batches

    def mixed_up(self, layer: int) -> bool:
        """Whether a recomputed forward pass of a layer may belong to another micro-batch than the last."""
        # Reentrant checkpointing runs the first forward without gradients, so it was not counted; the other kind is.
        counted = any(batch.calls[layer] for batch in self._batches)
        return not counted and sum(not batch.complete for batch in self._batches) > 1

    def add(self, batch: MicroBatch, weight: Tensor | None) -> None:
        """A forward pass begins. By the version of ``weight`` a later one sees whether somebody stepped."""
        self._batches.append(batch)
        self._weight = weight
        self.passed()
        self._wrapped = batch.wrapped or self._wrapped

    def passed(self) -> None:
        """A forward pass ends. It may have changed the weight itself, which is no step."""
        self._version = 0 if self._weight is None else self._weight._version

    def make_room(self, has_gradients: Callable[[], bool]) -> None:
        """Before a forward pass: forget abandoned micro-batches.

        A micro-batch is abandoned if its backward broke off (out of memory), or if its gradients were cleared without a
        step (by a loss scaler that skips the step). The latter shows in a model without gradients. Where they are kept
        outside ``p.grad``, as torch.autograd.grad does, all micro-batches of a step but the last count as abandoned.

        Raises RuntimeError where more micro-batches are left than an optimizer step can accumulate.
        """
        if in_backward():
            return
        version = self._version
        self.passed()
        if version != self._version and self.complete:
            self._passed_by += 1
            if self._passed_by == _PATIENCE:
                logger.warning(
                    "the weights changed after %d backward passes in a row, and FNGD's step was not called: it is "
                    "attached to a model that another optimizer trains. Call hf_fngd.detach(model), or tell "
                    "FNGDPreconditioner of the steps by preconditioner.follow(optimizer), or by preconditioner.step() "
                    "after each backward pass where the optimizer moves them inside it without a step, as LOMO does. "
                    "A hook that changes weights before each forward pass looks the same: then only the last "
                    "micro-batch of a step counts for the bound of clipped samples",
                    _PATIENCE,
                )
            self._batches = [batch for batch in self._batches if not batch.complete]
        if self.complete and not has_gradients():
            self._batches = [batch for batch in self._batches if not batch.complete]
        self._batches = [batch for batch in self._batches if batch.complete or not batch.reached]
        if len(self._batches) >= _LIMIT:
            self._batches = [batch for batch in self._batches if batch.complete]
            if len(self._batches) >= _LIMIT:
                raise RuntimeError(
                    f"{_LIMIT} backward passes without a step, more than an optimizer step can accumulate: "
                    "call preconditioner.step() after each optimizer.step(), or preconditioner.follow(optimizer) once"
                )

    def close(self) -> list[MicroBatchWeights]:
        """An optimizer step ends, taken or skipped. Returns the sample weights of the complete micro-batches."""
        self.stepped, self._passed_by = True, 0
        found = [batch.weights for batch in self._batches if batch.complete and batch.weights is not None]
        for batch in self._batches:
            batch.weights = None  # a graph that somebody keeps must not keep them
        self._batches, self._wrapped = [], None
        return found
