"""The micro-batches of the optimizer step under way, and their places in the epoch."""

from __future__ import annotations

from hf_fngd.backward import MicroBatch, in_backward
from hf_fngd.environment import rank_and_world

_LIMIT = 1024


class Window:
    """Opened by a forward pass, closed by the optimizer's step.

    Places count the micro-batches of all processes, round after round, since the epoch (or the sharing phase) began.

    Attributes:
        place: of the first micro-batch after the last step.
    """

    def __init__(self) -> None:
        self.place = 0
        self._batches: list[MicroBatch] = []

    @property
    def next_place(self) -> int:
        """The place of this process's next micro-batch."""
        return self.place + self._length() + rank_and_world()[0]

    @property
    def began(self) -> bool:
        """Whether there was a forward pass since the last step."""
        return bool(self._batches)

    @property
    def pending(self) -> int:
        """How many forward passes wait for their backward pass, or are in it."""
        return sum(not batch.complete for batch in self._batches)

    def add(self, batch: MicroBatch) -> None:
        """A forward pass begins."""
        self._batches.append(batch)

    def make_room(self, has_gradients: bool) -> None:
        """Before a forward pass: forget micro-batches that were abandoned.

        Those whose backward broke off (out of memory), and those whose gradients were cleared without a step (by a loss
        scaler that skips it).

        Args:
            has_gradients: whether any layer has a gradient.

        Raises:
            RuntimeError: there are more of them than an optimizer step can accumulate.
        """
        if in_backward():
            return
        if not has_gradients:
            self._batches = [batch for batch in self._batches if not batch.complete]
        self._batches = [batch for batch in self._batches if not batch.half_done]
        if len(self._batches) >= _LIMIT:
            self._batches = [batch for batch in self._batches if batch.complete]
            if len(self._batches) >= _LIMIT:
                raise RuntimeError(
                    f"{_LIMIT} backward passes without a step, more than an optimizer step can accumulate: "
                    "call preconditioner.step() after each optimizer.step(), or preconditioner.follow(optimizer) once"
                )

    def close(self) -> list[MicroBatch]:
        """The optimizer steps: the micro-batches whose backward pass is complete."""
        self.place += self._length()
        return self.abandon()

    def abandon(self) -> list[MicroBatch]:
        """The optimizer does not step: no place is used up."""
        batches, self._batches = [batch for batch in self._batches if batch.complete], []
        return batches

    def _length(self) -> int:
        _, world = rank_and_world()
        # Alike on all processes, the backward pass of one of which may have reached no layer.
        return world * (sum(batch.complete for batch in self._batches) if world == 1 else len(self._batches))
