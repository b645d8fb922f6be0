"""Which steps compute coefficients: the first-epoch phase, then one step in ``refresh``."""

from __future__ import annotations

import sys
import weakref
from dataclasses import dataclass
from typing import Any

from hf_fngd.sharing.base import State

_FIRST_PHASE, _REFRESH = 100, 50


def schedule(coefficient_steps: int | None, refresh: int | None, serve: bool) -> tuple[int, int]:
    """The arguments of FNGD with None filled in: 100 and 50 where coefficient steps serve something, 0 and 0 elsewhere.

    Args:
        coefficient_steps: cap of the first phase, in optimizer steps.
        refresh: distance of later coefficient steps, in optimizer steps.
        serve: whether the weights or the step scale need them.
    """
    first = (_FIRST_PHASE if serve else 0) if coefficient_steps is None else coefficient_steps
    return first, (_REFRESH if serve else 0) if refresh is None else refresh


@dataclass
class Phase:
    """The schedule of coefficient steps (Algorithm 1, with the refresh that it lacks).

    The first phase ends at the end of the first epoch or after ``coefficient_steps`` steps, whichever comes
    first; there is none where that is 0. Afterwards the step that follows the end of the phase by ``refresh - 1``
    steps, and every ``refresh``-th from there, is a coefficient step; none is where refresh is 0.

    Attributes:
        coefficient_steps: cap of the first phase, in optimizer steps.
        refresh: distance of later coefficient steps, in optimizer steps; 0 for none.
        always: every step is a coefficient step.
        steps: optimizer steps done.
        shared_since: value of ``steps`` at which the first phase ended; None while it lasts.
    """

    coefficient_steps: int
    refresh: int
    always: bool = False
    steps: int = 0
    shared_since: int | None = None

    def __post_init__(self) -> None:
        if self.coefficient_steps == 0:
            self.shared_since = 0

    @property
    def sharing(self) -> bool:
        """Whether the first phase is over."""
        return self.shared_since is not None

    @property
    def computes(self) -> bool:
        """Whether the step under way is a coefficient step."""
        if self.always or self.shared_since is None:
            return True
        return self.refresh > 0 and (self.steps - self.shared_since) % self.refresh == self.refresh - 1

    def advance(self) -> None:
        """An optimizer step was done."""
        self.steps += 1
        if self.shared_since is None and self.steps >= self.coefficient_steps:
            self.shared_since = self.steps

    def end_epoch(self) -> None:
        """An epoch ended. Ends the first phase if it lasts and has seen a step; idempotent."""
        if self.shared_since is None and self.steps > 0:
            self.shared_since = self.steps

    def state_dict(self) -> State:
        """The two counters."""
        return {"steps": self.steps, "shared_since": self.shared_since}

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        self.steps, self.shared_since = state["steps"], state["shared_since"]


class EpochEdge:
    """Sees the end of an epoch through Accelerate's data loaders, without a callback.

    A prepared data loader raises a flag with its last batch. What counts is the edge, a loader that was not up
    at this optimizer's last step and is now: flags of finished loaders stay up for whoever trains next.
    """

    def __init__(self) -> None:
        self._up = _loaders_at_their_end()
        self._ending: weakref.WeakSet[Any] = weakref.WeakSet()

    def passed(self) -> bool:
        """Whether the step that calls this was the last of an epoch."""
        now = _loaders_at_their_end()
        ended = any(loader not in self._up for loader in now)
        self._up, self._ending = now, weakref.WeakSet()
        return ended

    def missed(self) -> bool:
        """Whether an epoch ended without a step: the forward pass that calls this is already beyond it.

        Its last step was skipped, by a loss scaler for example.
        """
        now = _loaders_at_their_end()
        if self._ending and not any(loader in now for loader in self._ending):
            self._up, self._ending = now, weakref.WeakSet()
            return True
        self._ending |= now - self._up
        return False


def _loaders_at_their_end() -> weakref.WeakSet[Any]:
    # Looked up, not imported: a plain PyTorch loop has no use for accelerate.
    state = sys.modules.get("accelerate.state")
    if state is None or not state.GradientState._shared_state:
        return weakref.WeakSet()
    loaders = state.GradientState().dataloader_references
    return weakref.WeakSet(loader for loader in loaders if getattr(loader, "end_of_dataloader", False))
