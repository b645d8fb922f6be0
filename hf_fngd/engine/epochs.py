"""The end of an epoch, seen through Accelerate's data loaders without a callback."""

import sys
import weakref
from collections.abc import Callable
from typing import Any


class EpochEdge:
    """Sees an epoch end.

    A prepared data loader raises a flag with its last batch. What counts is the edge, a loader that was not up
    at this optimizer's last step and is now: flags of finished loaders stay up for whoever trains next. Of several
    loaders the first to end ends the epoch, unless `follow` names one.
    """

    def __init__(self) -> None:
        self._followed: Callable[[], Any] = lambda: None
        self._up = self._at_their_end()
        self._ending: weakref.WeakSet[Any] = weakref.WeakSet()
        self.others = False  # whether other loaders were under way when an epoch ended

    def follow(self, loader: Any) -> None:
        """Heed the ends of one prepared loader alone, as long as it exists. Raises TypeError for another one."""
        if not hasattr(loader, "end_of_dataloader"):
            raise TypeError(
                f"a {type(loader).__name__} does not show its end: pass the data loader that accelerator.prepare "
                "returned, or call end_epoch() after its last step"
            )
        self._followed = weakref.ref(loader)
        self._up, self._ending = self._at_their_end(), weakref.WeakSet()

    def passed(self) -> bool:
        """Whether the step that calls this was the last of an epoch."""
        now = self._at_their_end()
        ended = any(loader not in self._up for loader in now)
        self.others = ended and self._followed() is None and any(loader not in now for loader in _loaders())
        self._up, self._ending = now, weakref.WeakSet()
        return ended

    def missed(self) -> bool:
        """Whether an epoch ended without a step: the forward pass that calls this is already beyond it.

        Its last step was skipped, by a loss scaler for example.
        """
        now = self._at_their_end()
        if self._ending and not any(loader in now for loader in self._ending):
            self._up, self._ending = now, weakref.WeakSet()
            return True
        self._ending |= now - self._up
        return False

    def _at_their_end(self) -> weakref.WeakSet[Any]:
        followed = self._followed()
        loaders = _loaders() if followed is None else [followed]
        return weakref.WeakSet(loader for loader in loaders if getattr(loader, "end_of_dataloader", False))


def _loaders() -> list[Any]:
    """Those that are under way, or were left."""
    # Looked up, not imported: a plain PyTorch loop has no use for accelerate.
    state = sys.modules.get("accelerate.state")
    if state is None or not state.GradientState._shared_state:
        return []
    return [loader for loader in state.GradientState().dataloader_references if loader is not None]
