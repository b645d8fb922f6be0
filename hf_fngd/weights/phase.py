"""The first epoch of ``replay``, in which every optimizer step is a coefficient step (Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass

from hf_fngd.weights.base import State


@dataclass
class Phase:
    """Ends with the first epoch or after ``coefficient_steps`` optimizer steps, whichever comes first.

    Attributes:
        coefficient_steps: the cap, in optimizer steps; None for no cap.
        steps: optimizer steps done.
        shared_since: value of ``steps`` at which the phase ended; None while it lasts.
    """

    coefficient_steps: int | None
    steps: int = 0
    shared_since: int | None = None

    @property
    def over(self) -> bool:
        """Whether the phase has ended, and sample weights are shared."""
        return self.shared_since is not None

    def advance(self) -> bool:
        """An optimizer step was done; whether the phase ended with it."""
        self.steps += 1
        if self.over or self.coefficient_steps is None or self.steps < self.coefficient_steps:
            return False
        self.shared_since = self.steps
        return True

    def end_epoch(self) -> None:
        """An epoch ended. Ends the phase if it lasts and has seen a step; idempotent."""
        if self.shared_since is None and self.steps > 0:
            self.shared_since = self.steps

    def state_dict(self) -> State:
        """The two counters."""
        return {"steps": self.steps, "shared_since": self.shared_since}

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        self.steps, self.shared_since = state["steps"], state["shared_since"]
