"""The micro-batches of the optimizer step under way."""

import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import CheckpointFunction

from hf_fngd.distributed.environment import rank_and_world
from hf_fngd.distributed.exchange import sum_over_processes
from hf_fngd.distributed.replicas import Wrapped, wrapped
from hf_fngd.samples.ids import Ids
from hf_fngd.samples.rows import Rows, View
from hf_fngd.weights.base import MicroBatchWeights

logger = logging.getLogger(__name__)

_LIMIT = 1024
_PATIENCE = 3  # a step that is taken back and done again (SAM) changes the weights once


def in_backward() -> bool:
    """Whether a backward pass is under way, as it is where activation checkpointing recomputes a forward pass."""
    return bool(torch._C._current_graph_task_id() != -1)


def after_backward(call: Callable[[], None]) -> None:
    """Call it when the backward pass under way is over, and its micro-batches are complete.

    Raises RuntimeError within a pass of reentrant checkpointing, which is over before the one around it.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is CheckpointFunction.backward.__code__:
            raise RuntimeError(
                "an optimizer that FNGD follows stepped inside backward, within layers that reentrant checkpointing "
                "recomputes, where the end of the pass is not known: set use_reentrant=False, or follow none of these "
                "optimizers and call preconditioner.step() after each backward pass"
            )
    queue = Variable._execution_engine.queue_callback
    queue(lambda: queue(call))  # behind what completes micro-batches that backward has yet to reach


@dataclass(eq=False)
class MicroBatch:
    """One forward and backward pass of the model, as its layers see it."""

    size: int  # the number of samples N
    begin: Callable[[], MicroBatchWeights]  # makes its sample weights
    calls: list[int]  # how often each layer was called in the forward pass
    begins: Callable[[], Callable[["MicroBatch"], None] | None]  # refers to what a backward pass is told of first
    ids: Ids | None = None  # which of the samples each row or token belongs to, where the batch says so
    sizes: Mapping[str, frozenset[int]] = field(default_factory=dict)  # of its inputs, where a layer has `Shares`
    tokens: bool = False  # whether a traced graph has its tokens for rows
    recomputed: bool = False  # whether the forward pass is one that checkpointing of the whole model recomputes
    multiplications: int | None = None  # of its preconditioned layers' forwards; None where nobody asks
    wrapped: Wrapped | None = field(default_factory=wrapped)  # by DistributedDataParallel
    reached: bool = False  # whether a backward pass reached any layer
    complete: bool = False  # whether that came to its end
    of_graphs: set[int] = field(default_factory=set)  # layers that a traced backward pass has reached

    def __post_init__(self) -> None:
        self.weights: MicroBatchWeights | None = self.begin()  # until the optimizer step

    def restart(self, begin: Callable[[], MicroBatchWeights]) -> None:
        """Other sample weights, before any layer was weighed."""
        self.begin = begin
        self.weights = begin()

    @property
    def rows(self) -> int:
        """The number of rows of the batch B: N, unless ids say otherwise."""
        return self.size if self.ids is None else self.ids.batch

    def traced(self, rows: int) -> Rows | None:
        """Whose the rows of a call in a traced graph are, which counts tokens where ids may be those of tokens."""
        if self.ids is not None:
            return self.ids.locate((rows,), None)
        return View(0, "first") if self.tokens and rows != self.size else None

    def reach(self) -> None:
        """A layer's backward has begun. A pass that breaks off (out of memory) never becomes complete."""
        if not self.reached:
            self.reached = True
            if (begins := self.begins()) is not None:
                begins(self)
            Variable._execution_engine.queue_callback(self._finish)

    def _finish(self) -> None:
        self.complete = True


def positions(multiplications: int, weights: Iterable[Tensor | None], device: torch.device) -> int:
    """How many positions a layer sees in a step of all processes, that makes so many multiplications in this one.

    On average over all weights; 0 without a gradient in any process. A collective.
    """
    own = torch.tensor([multiplications], dtype=torch.float64, device="cpu" if rank_and_world()[1] == 1 else device)
    total = float(sum_over_processes(own))
    return max(1, round(total / sum(weight.numel() for weight in weights if weight is not None))) if total else 0


class Window:
    """The list of micro-batches that a forward pass opens and the optimizer step closes."""

    def __init__(self) -> None:
        self._batches: list[MicroBatch] = []
        self._weight: Tensor | None = None  # one whose version tells of a step
        self._version = 0  # when the last forward pass ended
        self._wrapped: Wrapped | None = None  # the last pass within DistributedDataParallel
        self.stepped = False  # whether it was closed ever
        self._passed_by = 0  # how often the weights were stepped, and this was not told, since it last was

    @property
    def begun(self) -> int:
        """How many micro-batches began since the last step, those of the other processes included."""
        return rank_and_world()[1] * sum(batch.reached or not batch.recomputed for batch in self._batches)

    @property
    def multiplications(self) -> int:
        """Those of the micro-batches since the last step."""
        return sum(batch.multiplications or 0 for batch in self._batches if batch.complete)

    @property
    def replicas(self) -> ProcessGroup | None:
        """The processes that take the same step, by the last pass that all of them ran: one may run more by itself."""
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
        """Forget the complete micro-batches beside one whose backward pass begins; whether there were any."""
        complete = [one for one in self._batches if one.complete and one is not batch]
        self._batches = [one for one in self._batches if one not in complete]
        return bool(complete)

    def mixed_up(self, layer: int) -> bool:
        """Whether a forward pass of a layer that checkpointing recomputes may be another than the last."""
        # Reentrant checkpointing ran it without gradients, uncounted; the other kind keeps to the call that counted.
        counted = any(batch.calls[layer] for batch in self._batches)
        return not counted and sum(not batch.complete for batch in self._batches) > 1

    def add(self, batch: MicroBatch, weight: Tensor | None) -> None:
        """A forward pass begins; the version of the weight tells of a step."""
        self._batches.append(batch)
        self._weight = weight
        self.passed()
        self._wrapped = batch.wrapped or self._wrapped

    def passed(self) -> None:
        """A forward pass ends, which may have changed the weight itself."""
        self._version = 0 if self._weight is None else self._weight._version

    def make_room(self, has_gradients: bool) -> None:
        """Before a forward pass: forget micro-batches that were abandoned, as the model has gradients or has none.

        Those whose backward broke off (out of memory), and those whose gradients were cleared without a step (by a loss
        scaler that skips it). The latter cannot be told where gradients are zeroed in place; and where they are kept
        outside of ``p.grad``, as torch.autograd.grad does, all micro-batches but a step's last count as abandoned.
        Raises RuntimeError where more of them are left than an optimizer step can accumulate.
        """
        if in_backward():
            return
        version = self._version
        self.passed()
        if version != self._version and any(batch.complete for batch in self._batches):
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
            has_gradients = False
        if not has_gradients:
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
        """The optimizer steps, or skips one: the weights of the micro-batches whose backward pass is complete."""
        self.stepped, self._passed_by = True, 0
        found = [batch.weights for batch in self._batches if batch.complete and batch.weights is not None]
        for batch in self._batches:
            batch.weights = None  # a graph that is kept keeps no more than it needs
        self._batches, self._wrapped = [], None
        return found
