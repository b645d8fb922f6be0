"""When to stop, and a remedy of trainings of large language models: leave out steps whose gradient is far too long."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

_WINDOW = 100  # steps that the median is of


class EarlyStopping(EarlyStoppingCallback):
    """Transformers' own; a run that it ended stays ended where it is started again."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop at once where the patience is over."""
        super().on_train_begin(args, state, control, **kwargs)
        control.should_training_stop |= self.early_stopping_patience_counter >= self.early_stopping_patience


class SkipSpikes(TrainerCallback, ExportableState):
    """Drops the gradients of a step whose norm is above `factor` times the median of the last hundred steps.

    Steps that were left out count in the median: if they did not, norms that rise by this factor at the beginning, as
    LoRA's do, would never be taken again. The first step is taken.

    The optimizer then has nothing to do: parameters and moments stay (FNGD closes the step, whose norms stand in for
    those of the next one's first micro-batches). Where Trainer clips the gradient it does so before, which bounds what
    is seen here: set `max_grad_norm=0`. Checkpoints keep what it has seen, for
    `restore_callback_states_from_checkpoint`. `skipped_steps` is logged at the end.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.norms: deque[float] = deque(maxlen=_WINDOW)
        self.skipped = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Look at the gradient."""
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
        if self.norms and not norm <= self.factor * statistics.median(self.norms):
            self.skipped += 1
            model.zero_grad()
        self.norms.append(math.inf if math.isnan(norm) else norm)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the number of steps that were left out."""
        state.log_history.append({"skipped_steps": self.skipped, "step": state.global_step})

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"args": {"factor": self.factor}, "attributes": {"norms": list(self.norms), "skipped": self.skipped}}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> SkipSpikes:
        """Return it as it was."""
        found = cls(**state["args"])
        found.norms.extend(state["attributes"]["norms"])
        found.skipped = state["attributes"]["skipped"]
        return found
