"""The end of an epoch, seen through Accelerate's data loaders without a callback."""

import sys
import weakref
from typing import Any


class EpochEdge:
    """Sees an epoch end.

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
