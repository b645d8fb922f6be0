"""The learning curve of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure  # no pyplot: it would look for a display
from matplotlib.ticker import MaxNLocator

from text.card import SCORES

_CURVES = (("loss", "train loss", "tab:blue"), ("eval_loss", "validation loss", "tab:orange"))


def plot_learning_curve(log_history: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw losses, and the validation score where one was measured, against epochs, from a Trainer's log."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for key, label, color in _CURVES:
        axes.plot(*_series(log_history, key), "o-", markersize=3, label=label, color=color)
    axes.set(title=title, xlabel="epoch", ylabel="loss (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    lines = axes.get_lines()
    for metric, name in SCORES.items():
        epochs, scores = _series(log_history, f"eval_{metric}")
        if scores:
            right = axes.twinx()
            right.plot(epochs, scores, "s--", markersize=3, label=f"validation {name}", color="tab:green")
            right.set_ylabel(name)
            lines = [*lines, *right.get_lines()]
    axes.legend(lines, [line.get_label() for line in lines], loc="center right")
    figure.savefig(path, dpi=120)


def _series(log_history: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Return epochs and values of the events that have the key."""
    events = [event for event in log_history if key in event]
    return [event["epoch"] for event in events], [event[key] for event in events]
