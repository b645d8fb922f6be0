"""What all recipes train with: a Trainer that times its steps, evaluates every row, and writes a true model card."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
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
        render_card: Returns the text of README.md; by default the Trainer makes one. That states the optimizer of
            `--optim`, whatever the optimizer was, and is written again at every push to the Hub.
        **kwargs: The Trainer's.
    """

    def __init__(
        self,
        *,
        callbacks: Iterable[TrainerCallback] | None = None,
        render_card: Callable[[], str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.timer, self.render_card = StepTimer(), render_card
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

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write README.md, by `render_card` alone where there is one."""
        if self.render_card is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            Path(self.args.output_dir, "README.md").write_text(self.render_card(), encoding="utf-8")

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
