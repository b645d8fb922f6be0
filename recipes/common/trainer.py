"""What all recipes train with: a Trainer that times its steps, and evaluates every row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer, TrainerCallback

from common.timer import StepTimer


class RecipeTrainer(Trainer):
    """A Trainer with a `timer` that it tells of the parts of a step; goes before Seq2SeqTrainer among bases.

    Args:
        callbacks: As the Trainer's. The timer comes first, so that theirs is not counted as time of a step.
        **kwargs: The Trainer's.
    """

    def __init__(self, *, callbacks: Iterable[TrainerCallback] | None = None, **kwargs: Any) -> None:
        self.timer = StepTimer()
        super().__init__(callbacks=[self.timer, *(callbacks or ())], **kwargs)

    def compute_loss(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss as the Trainer does; in training, that is the forward part."""
        result = super().compute_loss(model, *args, **kwargs)
        if model.training:
            self.timer.end("forward")
        return result

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Do what the Trainer does with a micro-batch: behind the forward part, that is the backward part."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self.timer.end("backward")
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the mean time of a step beside the training loss: all that a run which is cut off leaves of it."""
        mean = self.timer.mean() if "loss" in logs else None
        super().log(logs if mean is None else logs | {"step_seconds_mean": mean}, *args, **kwargs)

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader:
        """Drop the last rows of an epoch in training alone: Trainer's own drops them in an evaluation too."""
        asked = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = asked and is_training
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = asked


def logits_of(prediction: EvalPrediction) -> np.ndarray:
    """Return the logits `[n, C]`; those of some models come first of several outputs."""
    return prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of right answers, for Trainer's `compute_metrics`."""
    return {"accuracy": float((logits_of(prediction).argmax(axis=-1) == prediction.label_ids).mean())}
