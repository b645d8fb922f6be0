"""How long it takes: to reach a target, and for a step."""

from __future__ import annotations

from collections.abc import Sequence

from common.timer import PARTS
from comparison.markdown import filled_table, number, table
from comparison.plan import Comparison
from comparison.results import Record, best_epoch, first_reaching, mean, step_seconds, training_seconds, value

Finals = dict[str, list[Record]]


def speed(comparison: Comparison, finals: Finals) -> list[str]:
    """Return the sections on time."""
    return [*_target_section(comparison, finals), *_step_section(comparison, finals)]


def remarks(finals: Finals) -> list[str]:
    """Return what makes times incomparable: other hardware, other company on it."""
    records = [record for runs in finals.values() for record in runs]
    found = []
    if len(jobs := {record["jobs"] for record in records}) > 1:
        found.append(
            f"Of the final runs, some were made by {min(jobs)} and others by up to {max(jobs)} processes side by side: "
            "their seconds are not comparable."
        )
    known = {record["metrics"]["hardware"] for record in records if "hardware" in record["metrics"]}
    if len(known) > 1:
        found.append(f"Final runs were made on {'; on '.join(sorted(known))}: their seconds are not comparable.")
    return found


def targets(comparison: Comparison, finals: Finals) -> dict[float, str]:
    """Return the values of the metric to reach, each with where it comes from.

    They are the final values, in the mean over the seeds, of the reference and of the weakest arm.
    """
    scores = {
        arm: score for arm, records in finals.items() if (score := _mean_of(records, comparison.metric)) is not None
    }
    if not scores:
        return {}
    weakest = (min if comparison.maximize else max)(scores, key=lambda arm: scores[arm])
    found = {scores[weakest]: f"the weakest at the end: {weakest}"}
    if comparison.reference in scores:
        found.setdefault(scores[comparison.reference], f"the reference at the end: {comparison.reference}")
    return found


def _target_section(comparison: Comparison, finals: Finals) -> list[str]:
    wanted = targets(comparison, finals)
    if not wanted:
        return []
    bound = "at least" if comparison.maximize else "at most"
    sources = "; ".join(f"{number(target)} ({source})" for target, source in wanted.items())
    caption = (
        f"The first evaluation at which `{comparison.metric}` was {bound} the target, in the mean over the seeds; in "
        f"brackets, how many of them reached it where not all did. Targets: {sources}. Seconds are those of the "
        "optimizer steps until then."
    )
    head = ["optimizer", "best " + comparison.metric]
    head += [f"{number(target)}: {unit}" for target in wanted for unit in ("epochs", "seconds")]
    rows = []
    for arm, records in finals.items():
        reached = [cell for target in wanted for cell in _reached(comparison, records, target)]
        rows.append([arm, number(mean(best_epoch(comparison, record) for record in records)), *reached])
    return ["## Epochs and seconds to a target", caption, table(head, rows)]


def _reached(comparison: Comparison, records: Sequence[Record], target: float) -> list[str]:
    """Return the cells of an arm and a target: epochs and seconds."""
    hits = [(record, hit) for record in records if (hit := first_reaching(comparison, record, target)) is not None]
    if not hits:
        return ["-", "-"]
    missed = "" if len(hits) == len(records) else f" ({len(hits)} of {len(records)})"
    seconds = mean([None if (pace := step_seconds(record)) is None else pace * hit["step"] for record, hit in hits])
    epochs = mean([hit["epoch"] for _, hit in hits])
    return [number(epochs) + missed, "-" if seconds is None else number(seconds) + missed]


def _step_section(comparison: Comparison, finals: Finals) -> list[str]:
    reference = _mean_of(finals.get(comparison.reference, []), "step_seconds_mean")
    head = ["optimizer", "seconds a step", "seconds an epoch", f"ratio to {comparison.reference}", *PARTS]
    rows = []
    for arm, records in finals.items():
        step, *parts = (_mean_of(records, f"step_seconds_{name}") for name in ("mean", *PARTS))
        row = [arm, number(step), number(mean(map(_epoch_seconds, records)))]
        rows.append([*row, *(_ratio(seconds, reference) for seconds in (step, *parts))])
    caption = (
        "Mean over the steps, coefficient steps and other rare work included, and over the seeds; no evaluation and no "
        f"loading of data. Ratios are to the whole step of {comparison.reference}, so that the three parts add up to "
        "the ratio. FNGD computes and applies its sample weights inside the backward part; the other optimizers "
        "precondition in the update, which holds gradient clipping too (KFAC and Eva gather their statistics in the "
        "backward part)."
    )
    if silent := sum("hardware" not in record["metrics"] for records in finals.values() for record in records):
        caption += f" {silent} of the runs do not say on which hardware they were timed."
    return ["## Time of a step", caption, filled_table(head, rows)]


def _epoch_seconds(record: Record) -> float | None:
    seconds = training_seconds(record)
    return None if seconds is None else seconds / max(event["epoch"] for event in record["curve"])


def _mean_of(records: Sequence[Record], metric: str) -> float | None:
    return mean(value(record, metric) for record in records)


def _ratio(seconds: float | None, reference: float | None) -> str:
    return "-" if seconds is None or reference is None else f"{seconds / reference:.2f}"
