"""The file of finished runs, one JSON line each, and what can be read from it."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.jsonl import append_lines, finite, read_lines
from comparison.plan import Comparison, Run, recorded
from hf_fngd import last_complete_checkpoint

Record = dict[str, Any]
_CURVE = ("epoch", "step")


class Results:
    """The runs that ended, by their keys. Of several lines of a run the last one counts.

    A line holds `stage`, `arm`, `point`, `seed`, `key`, `options`, `status` ("finished", "failed" or "unfinished"),
    `seconds` (of the process; null where it had ended before), `jobs`, `resumed`; if it finished `metrics`, what the
    recipe reported except for lists, and `curve`, its events; if it failed `error`. A run that was cut off for want of
    time has `metrics` and `curve` up to its last checkpoint, and `step` of `max_steps`.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._records: dict[str, Record] = {record["key"]: record for record in read_lines(path)}

    def finished(self, run: Run) -> Record | None:
        """Return the record of a run; None unless it finished."""
        return self._with_status(run, "finished")

    def failed(self, run: Run) -> Record | None:
        """Return the record of a run whose last try failed."""
        return self._with_status(run, "failed")

    def unfinished(self, run: Run) -> Record | None:
        """Return the record of a run that was cut off for want of time."""
        return self._with_status(run, "unfinished")

    def of_arm(self, arm: str) -> list[Record]:
        """Return the records of an arm's runs that finished or were cut off."""
        return [r for r in self._records.values() if r["arm"] == arm and r["status"] != "failed"]

    def _with_status(self, run: Run, status: str) -> Record | None:
        record = self._records.get(run.key)
        return record if record is not None and record["status"] == status else None

    def append(self, run: Run, outcome: Record) -> Record:
        """Write a line."""
        record = {name: getattr(run, name) for name in ("stage", "arm", "point", "seed", "key")}
        record |= {"options": recorded(run.options)} | outcome
        with self._lock:
            self._records[run.key] = record
            append_lines(self.path, [record])
        return record


def read_outcome(folder: Path, comparison: Comparison) -> Record:
    """Read what a run left in its output folder.

    Returns:
        A part of a record: "finished" with `metrics` and `curve`, or "failed" with `error`.
    """
    history: list[Record] = []
    try:
        reported = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
        if (folder / "trainer_state.json").exists():
            history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    except (OSError, json.JSONDecodeError) as error:
        return {"status": "failed", "error": f"its results cannot be read: {type(error).__name__}"}
    if comparison.metric not in reported:
        return {"status": "failed", "error": f"all_results.json has no {comparison.metric}"}
    metrics = {key: value for key, value in reported.items() if not isinstance(value, list) and key != "dataset_name"}
    return finite({"status": "finished", "metrics": metrics, "curve": _curve(history, comparison)})


def read_progress(folder: Path, comparison: Comparison) -> Record:
    """Read how far a run came that was cut off, from the checkpoint that it will resume from.

    Returns:
        A part of a record: "unfinished" with `metrics` and `curve`, `step` and `max_steps`; the latter 0 and null where
        there is no checkpoint.
    """
    checkpoint = last_complete_checkpoint(folder)
    state: Record = {"log_history": [], "global_step": 0, "max_steps": None}
    if checkpoint is not None:
        state = json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))
    history = state["log_history"]
    last = {key: event[key] for event in history for key in event if key in (comparison.metric, "step_seconds_mean")}
    progress = {"step": state["global_step"], "max_steps": state["max_steps"]}
    return finite({"status": "unfinished", "metrics": last, "curve": _curve(history, comparison), **progress})


def _curve(history: Iterable[Record], comparison: Comparison) -> list[Record]:
    kept = {*_CURVE, *comparison.curves, "loss", comparison.metric}
    curve = [{key: event[key] for key in event if key in kept} for event in history]
    return [event for event in curve if len(event) > 2]


def best_points(comparison: Comparison, results: Results) -> dict[str, dict[str, Any]]:
    """Return each arm's best grid point: by the mean over the seeds, of the points that finished with all of them.

    An arm of one point has that, and an arm of which nothing finished, or nothing with a number, none.
    """
    best = {}
    for arm, declared in comparison.arms.items():
        points = declared.points()
        if len(points) == 1:
            best[arm] = points[0]
            continue
        scored = [
            (score, point) for point in points if (score := screened(comparison, results, arm, point)) is not None
        ]
        if scored:
            best[arm] = (max if comparison.maximize else min)(scored, key=lambda pair: pair[0])[1]
    return best


def screened(comparison: Comparison, results: Results, arm: str, point: Mapping[str, Any]) -> float | None:
    """Return a grid point's mean metric over the seeds of the screening; None if one of them has none."""
    runs = [run for run in comparison.screen_runs() if run.arm == arm and run.point == point]
    return mean([value(results.finished(run), comparison.metric) for run in runs])


def value(record: Record | None, metric: str) -> float | None:
    """Return a metric of a record; None if there is no number."""
    found = None if record is None else record["metrics"].get(metric)
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else None


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean; None if there are no values or one is None."""
    values = list(values)
    return sum(values) / len(values) if values and None not in values else None


def evaluations(comparison: Comparison, record: Record) -> list[Record]:
    """Return the events of a run's curve that have the metric, and its final value as the last one."""
    events = [event for event in record["curve"] if event.get(comparison.metric) is not None]
    final, last = value(record, comparison.metric), max(record["curve"], key=lambda event: event["step"], default=None)
    if final is not None and last is not None:
        events.append({**{key: last[key] for key in _CURVE}, comparison.metric: final})
    return events


def best_epoch(comparison: Comparison, record: Record) -> float | None:
    """Return the best value of the metric over a run's curve."""
    scores = [event[comparison.metric] for event in record["curve"] if event.get(comparison.metric) is not None]
    return (max if comparison.maximize else min)(scores) if scores else None


def first_reaching(comparison: Comparison, record: Record, target: float) -> Record | None:
    """Return the first evaluation of a run at which the metric had reached a target; None if there is none."""
    sign = 1 if comparison.maximize else -1
    reached = (event for event in evaluations(comparison, record) if sign * (event[comparison.metric] - target) >= 0)
    return next(reached, None)


def step_seconds(record: Record) -> float | None:
    """Return the mean time of an optimizer step, with evaluation and loading of data left out."""
    return value(record, "step_seconds_mean")


def training_seconds(record: Record) -> float | None:
    """Return the time of all optimizer steps."""
    steps, seconds = max((event["step"] for event in record["curve"]), default=None), step_seconds(record)
    return None if steps is None or seconds is None else steps * seconds
