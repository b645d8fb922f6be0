"""The page of a comparison, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import yaml

from comparison import speed
from comparison.grids import grid_sections
from comparison.markdown import as_number, filled_table, number, spread, table
from comparison.plan import Comparison, in_words, recorded
from comparison.results import (
    Record,
    Results,
    best_epoch,
    best_points,
    mean,
    step_seconds,
    training_seconds,
    value,
)

_TRAINING = ("train_nll", "eval_nll")


def report(comparison: Comparison, results: Results) -> str:
    """Return the page of the runs that ended.

    It has remarks on what limits the comparison; tables of the best points, of the time to a target, of a step's time,
    of the gap between training and validation, of the grids; the options.
    """
    best = best_points(comparison, results)
    finals: dict[str, list[Record]] = {arm: [] for arm in comparison.arms}
    for run in comparison.final_runs(best):
        if record := results.finished(run):
            finals[run.arm].append(record)
    parts = [f"# {comparison.name}", _introduction(comparison, results)]
    if found := remarks(comparison, results, finals):
        parts.append("**Mind:**\n\n" + "\n".join(f"- {remark}" for remark in found))
    finals = {arm: of_arm for arm, of_arm in finals.items() if of_arm}
    if finals:
        parts += ["## Best grid points", _best_table(comparison, finals), *_signatures(finals)]
    parts += _unfinished_section(comparison, results)
    if finals:
        parts += speed.speed(comparison, finals) + _gap_section(finals)
    parts += grid_sections(comparison, results)
    set_elsewhere = {*comparison.screen.options, *comparison.final.options}
    set_elsewhere.update(*(arm.grid for arm in comparison.arms.values()))
    common = {key: item for key, item in recorded(comparison.options).items() if key not in set_elsewhere}
    parts += [
        f"![Curves]({comparison.name}.png)",
        "## Options of all runs",
        f"```yaml\n{yaml.safe_dump(common, sort_keys=False)}```",
    ]
    return "\n\n".join(parts) + "\n"


def remarks(comparison: Comparison, results: Results, finals: dict[str, list[Record]]) -> list[str]:
    """Return what a reader has to know before the figures: unequal grids, missing runs, spreads that overlap."""
    found = []
    sizes = {arm: n for arm, declared in comparison.arms.items() if (n := len(declared.points())) > 1}
    if len(set(sizes.values())) > 1:
        found.append("The grids are not of equal size: " + ", ".join(f"`{arm}` {n}" for arm, n in sizes.items()) + ".")
    if sizes and (alone := [f"`{arm}`" for arm in comparison.arms if arm not in sizes]):
        found.append(f"Of one point, without a grid: {', '.join(alone)}.")
    runs = comparison.screen_runs() + comparison.final_runs(best_points(comparison, results))
    found += [f"Failed: {run} ({record['error']})." for run in runs if (record := results.failed(run))]
    if missing := [f"`{arm}`" for arm, of_arm in finals.items() if not of_arm]:
        found.append(f"No finished final run: {', '.join(missing)}.")
    for arm, of_arm in finals.items():
        if 0 < len(of_arm) < len(comparison.final.seeds):
            found.append(f"`{arm}` has {len(of_arm)} of {len(comparison.final.seeds)} seeds.")
        if of_arm:
            found += _edges(comparison, arm, of_arm[0]["point"])
    screens = [run for run in comparison.screen_runs() if not results.finished(run) and not results.failed(run)]
    if screens:
        found.append(f"{len(screens)} runs of the screening are missing.")
    reused = sorted(set(comparison.screen.seeds) & set(comparison.final.seeds))
    if reused and comparison.screen_runs():
        found.append(
            f"Seed {', '.join(map(str, reused))} chose the points and is a final seed too: their scores are a little "
            f"too good, most of all {comparison.metric}."
        )
    if len(comparison.final.seeds) == 1:
        found.append("There is one seed: no spread.")
    records = [record for run in runs if (record := results.finished(run))]
    if any(record["jobs"] > 1 for record in records):
        found.append("Some runs were made side by side, which their seconds show.")
    found += speed.remarks(finals)
    return found + _overlaps(comparison, finals)


def _edges(comparison: Comparison, arm: str, point: Mapping[str, Any]) -> list[str]:
    """Name the values of a best point that are the smallest or largest tried: a better one may lie beyond."""
    found = []
    for key, tried in comparison.arms[arm].grid.items():
        numbers = sorted(n for item in tried if (n := as_number(item)) is not None)
        if len(numbers) == len(tried) > 2 and float(point[key]) in (numbers[0], numbers[-1]):
            found.append(f"The best {key} of `{arm}`, {point[key]}, lies at the edge of its grid.")
    return found


def _overlaps(comparison: Comparison, finals: dict[str, list[Record]]) -> list[str]:
    """Name neighbours in the ranking by the first test metric whose ranges over the seeds overlap."""
    metric = comparison.test_metrics[0]
    scores = {arm: [v for record in finals[arm] if (v := value(record, metric)) is not None] for arm in finals}
    ordered = sorted((arm for arm in scores if len(scores[arm]) > 1), key=lambda arm: -statistics.mean(scores[arm]))
    pairs = [
        f"`{first}` and `{second}`"
        for first, second in pairwise(ordered)
        if min(scores[first]) <= max(scores[second]) and min(scores[second]) <= max(scores[first])
    ]
    if not pairs:
        return []
    return [
        f"These neighbours in {metric} differ by less than their seeds do, their ranges overlap: {'; '.join(pairs)}."
    ]


def _introduction(comparison: Comparison, results: Results) -> str:
    sense = "highest" if comparison.maximize else "lowest"
    lines = [f"Runs of `{comparison.recipe.name}` by `recipes/compare.py`; the lines are in `{results.path.name}`."]
    if comparison.screen_runs():
        seeds = ", ".join(map(str, comparison.screen.seeds))
        lines.append(
            f"Each grid point ran with seed {seeds} ({in_words(recorded(comparison.screen.options))}); the one of the "
            f"{sense} validation metric `{comparison.metric}` went on."
        )
    seeds = ", ".join(map(str, comparison.final.seeds))
    lines.append(
        f"Best points: seeds {seeds} ({in_words(recorded(comparison.final.options))}), mean ± standard deviation over "
        "the seeds (smallest to largest). Seconds are those of the optimizer steps."
    )
    return "\n".join(lines)


def _best_table(comparison: Comparison, finals: dict[str, list[Record]]) -> str:
    head = ["optimizer", "best point", "grid", "seeds", comparison.metric, f"{comparison.metric}, best epoch"]
    head += [*comparison.test_metrics, "seconds", "seconds a step"]
    measures = [partial(value, metric=comparison.metric), partial(best_epoch, comparison)]
    measures += [partial(value, metric=metric) for metric in comparison.test_metrics]
    rows = []
    for arm, records in finals.items():
        cells = [arm, in_words(records[0]["point"]), str(len(comparison.arms[arm].points())), str(len(records))]
        cells += [spread(map(measure, records)) for measure in measures]
        cells += [number(mean(map(measure, records))) for measure in (training_seconds, step_seconds)]
        rows.append(cells)
    return filled_table(head, rows)


def _unfinished_section(comparison: Comparison, results: Results) -> list[str]:
    """Say how far the final runs came that were cut off; the plot has their curves, dashed."""
    head = ["optimizer", "point", "seed", "step", "of", comparison.metric, "best so far", "seconds a step"]
    runs = comparison.final_runs(best_points(comparison, results))
    rows = [
        [run.arm, in_words(run.point), str(run.seed), str(record["step"]), str(record["max_steps"] or "-")]
        + [number(x) for x in (value(record, comparison.metric), best_epoch(comparison, record), step_seconds(record))]
        for run in runs
        if (record := results.unfinished(run))
    ]
    caption = "Out of time before the end, in the middle of their schedules: not the scores of finished runs."
    return ["## Unfinished runs", caption, table(head, rows)] if rows else []


def _gap_section(finals: dict[str, list[Record]]) -> list[str]:
    """Compare training and validation at the end, where a recipe measured both by the same loss or logged one."""
    records = [record for runs in finals.values() for record in runs]
    if not any(value(record, "train_nll") is not None or _logged_loss(record) is not None for record in records):
        return []
    measures = [_logged_loss, *(partial(value, metric=name) for name in _TRAINING), _gap]
    rows = [[arm, *(spread(map(measure, of_arm)) for measure in measures)] for arm, of_arm in finals.items()]
    caption = (
        "`train_nll` and `eval_nll` are the same loss at the end of training, without label smoothing and dropout: in "
        "the start of the training split and in the validation split. The gap is their difference. The logged loss is "
        "Trainer's last one, with both."
    )
    return [
        "## Training and validation loss",
        caption,
        filled_table(["optimizer", "logged loss", *_TRAINING, "gap"], rows),
    ]


def _logged_loss(record: Record) -> float | None:
    losses = [event["loss"] for event in record["curve"] if event.get("loss") is not None]
    return losses[-1] if losses else None


def _gap(record: Record) -> float | None:
    train, validation = (value(record, name) for name in _TRAINING)
    return None if train is None or validation is None else validation - train


def _signatures(finals: dict[str, list[Record]]) -> list[str]:
    found = {
        str(item)
        for records in finals.values()
        for record in records
        for key, item in record["metrics"].items()
        if key.endswith("_signature")
    }
    return [f"sacreBLEU {', '.join(f'`{item}`' for item in sorted(found))}."] if found else []
