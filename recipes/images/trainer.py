"""The Trainer of the image recipe, and what a run comes to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from common.trainer import RecipeTrainer, accuracy
from images.data import Columns, as_it_is

# Keys of evaluations in mid-training.
VALIDATION, TEST = "eval_validation_accuracy", "eval_test_accuracy"


class ImageTrainer(RecipeTrainer):
    """A Trainer for `images.data.Columns`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(data_collator=as_it_is, compute_metrics=accuracy, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Create Trainer's scheduler, behind which `decay_at` divides the learning rate."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.args.decay_at:
            bounds = [share * num_training_steps - 1e-6 for share in self.args.decay_at]  # but for rounding
            plain = scheduler.lr_lambdas[0]  # one for each parameter group, which are equal
            lambdas = [lambda step: plain(step) * 0.1 ** sum(step >= bound for bound in bounds)]
            scheduler.lr_lambdas = lambdas * len(scheduler.lr_lambdas)
        return scheduler

    def score(self, split: Columns, prefix: str) -> dict[str, float]:
        """Return the loss and the accuracy of a split, with the prefix and an underscore before their names."""
        metrics = self.predict(split, metric_key_prefix=prefix).metrics
        return {name: metrics[name] for name in (f"{prefix}_loss", f"{prefix}_accuracy")}


def best_epochs(history: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the test accuracies that stopping at an epoch would have reached.

    Args:
        history: `trainer.state.log_history`: dictionaries with `step`, `epoch` and what was measured.

    Returns:
        `selected_test_accuracy`, at the epoch (`selected_epoch`) of the best validation accuracy, of equals the first:
        early stopping by what one has. `best_test_accuracy`, of all epochs: nobody can select that. Nothing where no
        epoch was evaluated.
    """
    measured: dict[int, dict[str, Any]] = {}
    for event in history:
        if VALIDATION in event or TEST in event:
            measured.setdefault(event["step"], {}).update(event)
    epochs = [event for _, event in sorted(measured.items()) if VALIDATION in event and TEST in event]
    if not epochs:
        return {}
    selected = max(epochs, key=lambda event: event[VALIDATION])
    return {
        "selected_epoch": selected["epoch"],
        "selected_validation_accuracy": selected[VALIDATION],
        "selected_test_accuracy": selected[TEST],
        "best_test_accuracy": max(event[TEST] for event in epochs),
    }
