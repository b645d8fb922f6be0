"""What a run comes to: accuracies at the end and at the best epochs, and what was memorized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

# Keys of evaluations in mid-training.
NOISY, TEST = "eval_noisy_accuracy", "eval_test_accuracy"


def best_epochs(history: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the test accuracies that stopping at an epoch would have reached.

    Args:
        history: `trainer.state.log_history`: dictionaries with `step`, `epoch` and what was measured.

    Returns:
        `selected_test_accuracy`, at the epoch (`selected_epoch`) of the best accuracy on noisy validation labels, of
        equals the first: early stopping by what one has. `best_test_accuracy`, of all epochs: nobody can select
        that. Nothing where no epoch was evaluated.
    """
    measured: dict[int, dict[str, Any]] = {}
    for event in history:
        if NOISY in event or TEST in event:
            measured.setdefault(event["step"], {}).update(event)
    epochs = [event for _, event in sorted(measured.items()) if NOISY in event and TEST in event]
    if not epochs:
        return {}
    selected = max(epochs, key=lambda event: event[NOISY])
    return {
        "selected_epoch": selected["epoch"],
        "selected_noisy_accuracy": selected[NOISY],
        "selected_test_accuracy": selected[TEST],
        "best_test_accuracy": max(event[TEST] for event in epochs),
    }


def memorized(logits: Tensor, given: Tensor, true: Tensor) -> dict[str, float | None]:
    """Return what a model made of the labels that it was trained on.

    Args:
        logits: Of the training images, `[n, C]`.
        given: Labels that it was trained on, `[n]`.
        true: True labels, `[n]`.

    Returns:
        `train_accuracy`, the share of given labels that it fits; of those that are wrong `wrong_fitted`, the share
        that it fits, and `wrong_corrected`, the share whose true class it says (None where no label is wrong).
    """
    answers, wrong = logits.argmax(dim=1), given != true
    some = bool(wrong.any())
    return {
        "train_accuracy": float((answers == given).double().mean()),
        "wrong_labels": float(wrong.double().mean()),
        "wrong_fitted": float((answers == given)[wrong].double().mean()) if some else None,
        "wrong_corrected": float((answers == true)[wrong].double().mean()) if some else None,
    }
