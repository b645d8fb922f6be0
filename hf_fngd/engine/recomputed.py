"""Which micro-batch a layer belongs to that activation checkpointing recomputes, where a step has several of them.

torch keeps an object of its own for each region that it checkpoints (without ``use_reentrant``). The region's hooks on
saved tensors hold it in its forward pass, and the call that recomputes the region has it as a local variable.
"""

import weakref
from typing import Any

import torch
from torch.utils.checkpoint import _CheckpointFrame

from hf_fngd.engine.window import MicroBatch
from hf_fngd.stack import callers

# Torch has it from version 2.8 on; without it a recomputed layer is taken for one of the last forward pass.
_top_hooks: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_tracing: None)


class Regions:
    """The micro-batches of the regions that are checkpointed; None for a region outside of the model's forward."""

    def __init__(self) -> None:
        self._batches: weakref.WeakKeyDictionary[Any, MicroBatch | None] = weakref.WeakKeyDictionary()

    def note(self, batch: MicroBatch | None) -> None:
        """A layer is called: if that is within a region, the region belongs to this micro-batch."""
        if hooks := _top_hooks(True):
            for cell in getattr(hooks[0], "__closure__", None) or ():
                if isinstance(cell.cell_contents, _CheckpointFrame):
                    self._batches[cell.cell_contents] = batch

    def find(self, otherwise: MicroBatch | None) -> MicroBatch | None:
        """The micro-batch of the innermost region that is being recomputed, if torch shows it."""
        for frame in callers():
            if frame.f_code.co_name == "unpack_hook":
                region = frame.f_locals.get("frame")
                if isinstance(region, _CheckpointFrame):
                    return self._batches.get(region, otherwise)
        return otherwise
