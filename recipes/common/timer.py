"""The time of optimizer steps."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import TrainerCallback


class StepTimer(TrainerCallback):
    """Takes the time of each optimizer step: forward, backward and update, without the loading of data."""

    WARM_UP = 10  # steps that allocators and caches need

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop the clock, when the device has done what it was told."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.seconds.append(time.perf_counter() - self._start)

    def median(self) -> float | None:
        """Return the median in seconds, the first steps aside; None where there were no others."""
        timed = self.seconds[self.WARM_UP :]
        return statistics.median(timed) if timed else None

    def mean(self) -> float | None:
        """Return the mean likewise: what an optimizer does in one step of ten or of a hundred counts too."""
        timed = self.seconds[self.WARM_UP :]
        return statistics.mean(timed) if timed else None
