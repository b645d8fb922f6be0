"""The tables of a comparison, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise

import yaml

from comparison.plan import Comparison, Run, describe, recorded
from comparison.results import Record, Results, best_points, mean, screened, step_seconds, training_seconds, value


def report(comparison: Comparison, results: Results) -> str:
    """Write the page.

    Args:
        comparison: What was compared.
        results: The runs that ended.

    Returns:
        Remarks on what limits the comparison, the table of the best points, the table of the grids, the options.
    """
    best = best_points(comparison, results)
    finals = {
        arm: [record for run in comparison.final_runs({arm: best[arm]}) if (record := results.finished(run))]
        for arm in best
    }
    parts = [f"# {comparison.name}", _introduction(comparison)]
    if found := remarks(comparison, results, finals):
        parts.append("**Mind:**\n\n" + "\n".join(f"- {remark}" for remark in found))
    parts += ["## Best grid points", _best_table(comparison, results, finals)]
    parts += _signatures(finals)
    if comparison.screen_runs():
        parts += ["## Grids", _grid_table(comparison, results)]
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
    sizes = {arm: len(declared.points()) for arm, declared in comparison.arms.items()}
    if len(set(sizes.values())) > 1:
        found.append("The grids are not of equal size: " + ", ".join(f"{arm} {n}" for arm, n in sizes.items()) + ".")
    runs = comparison.screen_runs() + comparison.final_runs(best_points(comparison, results))
    found += [f"Failed: {run} ({record['error']})." for run in runs if (record := results.failed(run))]
    for arm in comparison.arms:
        if not finals.get(arm):
            found.append(f"{arm} has no finished final run.")
        elif len(finals[arm]) < len(comparison.final.seeds):
            found.append(f"{arm} has {len(finals[arm])} of {len(comparison.final.seeds)} seeds.")
        found += _edges(comparison, finals, arm)
    screens = [run for run in comparison.screen_runs() if not results.finished(run) and not results.failed(run)]
    if screens:
        found.append(f"{len(screens)} runs of the screening are missing.")
    if len(comparison.final.seeds) == 1:
        found.append("There is one seed: no spread.")
    records = [record for run in runs if (record := results.finished(run))]
    if any(record["jobs"] > 1 for record in records):
        found.append("Some runs were made side by side, which their seconds show.")
    return found + _overlaps(comparison, finals)


def _edges(comparison: Comparison, finals: dict[str, list[Record]], arm: str) -> list[str]:
    """Name the values of a best point that are the smallest or largest tried: a better one may lie beyond."""
    if not finals.get(arm):
        return []
    point = finals[arm][0]["point"]
    found = []
    for key, tried in comparison.arms[arm].grid.items():
        numbers = sorted(float(item) for item in tried if _is_number(item))
        if len(numbers) == len(tried) > 2 and float(point[key]) in (numbers[0], numbers[-1]):
            found.append(f"The best {key} of {arm}, {point[key]}, lies at the edge of its grid.")
    return found


def _overlaps(comparison: Comparison, finals: dict[str, list[Record]]) -> list[str]:
    """Name neighbours in the ranking by the first test metric whose ranges over the seeds overlap."""
    metric = comparison.test_metrics[0]
    scores = {arm: [v for record in finals[arm] if (v := value(record, metric)) is not None] for arm in finals}
    ranked = sorted((arm for arm in scores if len(scores[arm]) > 1), key=lambda arm: -statistics.mean(scores[arm]))
    return [
        f"{metric} of {first} and of {second} differ by less than their seeds do: the ranges overlap."
        for first, second in pairwise(ranked)
        if min(scores[first]) <= max(scores[second]) and min(scores[second]) <= max(scores[first])
    ]


def _introduction(comparison: Comparison) -> str:
    sense = "highest" if comparison.maximize else "lowest"
    lines = [f"Runs of `{comparison.recipe.name}` by `recipes/compare.py`; the lines are in `{comparison.name}.jsonl`."]
    if comparison.screen_runs():
        seeds = ", ".join(map(str, comparison.screen.seeds))
        lines.append(
            f"Each grid point ran with seed {seeds} ({describe(recorded(comparison.screen.options))}); the one of the "
            f"{sense} validation metric `{comparison.metric}` went on."
        )
    seeds = ", ".join(map(str, comparison.final.seeds))
    lines.append(
        f"Best points: seeds {seeds} ({describe(recorded(comparison.final.options))}), mean ± standard deviation over "
        "the seeds (smallest to largest). Seconds are those of the optimizer steps."
    )
    return "\n".join(lines)


def _best_table(comparison: Comparison, results: Results, finals: dict[str, list[Record]]) -> str:
    head = ["optimizer", "best point", "grid", "seeds", comparison.metric, f"{comparison.metric}, best epoch"]
    head += [*comparison.test_metrics, "seconds", "seconds a step"]
    rows = []
    for arm, declared in comparison.arms.items():
        records = finals.get(arm, [])
        cells = [arm, describe(records[0]["point"]) if records else "-", str(len(declared.points())), str(len(records))]
        cells.append(_spread([value(record, comparison.metric) for record in records]))
        cells.append(_spread([_best_epoch(comparison, record) for record in records]))
        cells += [_spread([value(record, metric) for record in records]) for metric in comparison.test_metrics]
        cells += [
            _number(mean([measure(record) for record in records])) for measure in (training_seconds, step_seconds)
        ]
        rows.append(cells)
    return _table(head, rows)


def _grid_table(comparison: Comparison, results: Results) -> str:
    rows = []
    for arm, declared in comparison.arms.items():
        points = declared.points()
        if len(points) == 1:
            continue
        for point in points:
            runs = [run for run in comparison.screen_runs() if run.arm == arm and run.point == point]
            rows.append(
                [
                    arm,
                    describe(point),
                    _screened_cell(comparison, results, runs, screened(comparison, results, arm, point)),
                ]
            )
    return _table(["optimizer", "point", comparison.metric], rows)


def _screened_cell(comparison: Comparison, results: Results, runs: Sequence[Run], score: float | None) -> str:
    if score is not None:
        return _number(score)
    if any(results.failed(run) for run in runs):
        return "failed"
    return "not a number" if all(results.finished(run) for run in runs) else "-"


def _best_epoch(comparison: Comparison, record: Record) -> float | None:
    scores = [event[comparison.metric] for event in record["curve"] if event.get(comparison.metric) is not None]
    return (max if comparison.maximize else min)(scores) if scores else None


def _signatures(finals: dict[str, list[Record]]) -> list[str]:
    found = {
        str(item)
        for records in finals.values()
        for record in records
        for key, item in record["metrics"].items()
        if key.endswith("_signature")
    }
    return [f"sacreBLEU {', '.join(f'`{item}`' for item in sorted(found))}."] if found else []


def _spread(values: Sequence[float | None]) -> str:
    center = mean(values)
    if center is None:
        return "not a number" if values and any(v is not None for v in values) else "-"
    known = [v for v in values if v is not None]
    if len(known) == 1:
        return _number(center)
    return f"{_number(center)} ± {statistics.stdev(known):.2g} ({_number(min(known))} to {_number(max(known))})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _is_number(item: object) -> bool:
    try:
        float(item)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return not isinstance(item, bool)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
