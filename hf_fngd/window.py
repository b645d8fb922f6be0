"""The micro-batches of the optimizer step under way, and their places in the epoch."""

from __future__ import annotations

from dataclasses import replace

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
        return self.place + self.begun + rank_and_world()[0]

    @property
    def begun(self) -> int:
        """How many micro-batches began since the last step, those of the other processes included."""
        return rank_and_world()[1] * sum(batch.reached or not batch.recomputed for batch in self._batches)

    def mixed_up(self, layer: int) -> bool:
        """Whether a forward pass of a layer that checkpointing recomputes may be another than the last."""
        # Reentrant checkpointing ran it without gradients, uncounted; the other kind keeps to the call that counted.
        counted = any(batch.calls[layer] for batch in self._batches)
        return not counted and sum(not batch.complete for batch in self._batches) > 1

    def add(self, batch: MicroBatch) -> None:
        """A forward pass begins."""
        self._batches.append(batch)

    def make_room(self, has_gradients: bool) -> None:
        """Before a forward pass: forget micro-batches that were abandoned.

        Those whose backward broke off (out of memory), and those whose gradients were cleared without a step (by a loss
        scaler that skips it). The latter cannot be told where gradients are zeroed in place; and where they are kept
        outside of ``p.grad``, as torch.autograd.grad does, all micro-batches but a step's last count as abandoned.

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
        """The optimizer steps: the micro-batches whose backward pass is complete, each in its place."""
        start, begun = self.place, self.begun
        batches = self.abandon()
        if rank_and_world()[1] > 1:
            # What began, which all processes do alike: the backward pass of one may have reached no layer.
            self.place += begun
            return batches
        self.place += len(batches)
        for place, batch in enumerate(batches, start=start):  # a forward pass without a backward pass has none
            batch.info = replace(batch.info, place=place)
        return batches

    def abandon(self) -> list[MicroBatch]:
        """The optimizer does not step: no place is used up."""
        batches, self._batches = [batch for batch in self._batches if batch.complete], []
        return batches
