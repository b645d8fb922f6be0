"""The time of optimizer steps, and of what they consist of."""

from __future__ import annotations

import platform
import statistics
import time
from typing import Any

import torch
from transformers import TrainerCallback

PARTS = ("forward", "backward", "update")


class StepTimer(TrainerCallback):
    """Takes the time of each optimizer step: forward, backward and update, without the loading of data.

    Under a `RecipeTrainer` it takes the parts' times too, summed over the micro-batches of a step. "forward" ends with
    the loss; "backward" with the gradients, FNGD's sample weights included; "update" is the rest:
    clipping, the optimizer's step, which is where other optimizers precondition, the scheduler, zeroed gradients.
    """

    WARM_UP = 10  # steps that allocators and caches need

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.parts: list[dict[str, float]] = []
        self._start = self._mark = 0.0
        self._current: dict[str, float] = {}

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._start = self._mark = time.perf_counter()
        self._current = {}

    def end(self, part: str) -> None:
        """Count the time since the last end of a part, or the begin of the step, as this part's."""
        now = self._now()
        self._current[part] = self._current.get(part, 0.0) + now - self._mark
        self._mark = now

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        now = self._now()
        self.seconds.append(now - self._start)
        if self._current:
            self.parts.append(self._current | {"update": now - self._mark})

    def median(self) -> float | None:
        """Return the median in seconds, the first steps aside; None where there were no others."""
        timed = self.seconds[self.WARM_UP :]
        return statistics.median(timed) if timed else None

    def mean(self) -> float | None:
        """Return the mean likewise: what an optimizer does in one step of ten or of a hundred counts too."""
        timed = self.seconds[self.WARM_UP :]
        return statistics.mean(timed) if timed else None

    def report(self) -> dict[str, Any]:
        """Return what all_results.json holds: median and mean of a step, the mean of each part, the hardware."""
        times: dict[str, Any] = {"step_seconds_median": self.median(), "step_seconds_mean": self.mean()}
        timed = self.parts[self.WARM_UP :]
        for part in PARTS if timed else ():
            times[f"step_seconds_{part}"] = statistics.mean(parts[part] for parts in timed)
        return times | {"hardware": hardware()}

    def _now(self) -> float:
        """Return the time at which the device has done what it was told."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter()


def hardware() -> str:
    """Return what the times were taken on: the accelerator's name, or the CPU's kind and the number of threads."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    if torch.accelerator.is_available():
        return str(torch.accelerator.current_accelerator())
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)"
