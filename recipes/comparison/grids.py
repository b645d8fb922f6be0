"""The screening: each arm's grid, and how much depends on the point."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from comparison.markdown import as_number, number, table
from comparison.plan import Arm, Comparison, in_words
from comparison.results import Results, screened


def grid_sections(comparison: Comparison, results: Results) -> list[str]:
    """Return a table for each option that arms are pivoted by: a row an arm and its other options, a column a value."""
    ended = {run.arm for run in comparison.screen_runs() if results.finished(run) or results.failed(run)}
    grids = {arm: declared for arm, declared in comparison.arms.items() if len(declared.points()) > 1 and arm in ended}
    common = Counter(option for declared in grids.values() for option in _varied(declared))
    pivots: dict[str, list[str]] = {}
    for arm, declared in grids.items():
        pivots.setdefault(max(_varied(declared), key=lambda option: common[option]), []).append(arm)
    if not pivots:
        return []
    caption = (
        f"`{comparison.metric}` of each point. Loss: how much worse than the best of its row the others are, in the "
        "mean and at most; none where a point has no number."
    )
    return ["## Grids", caption, *(_pivot(comparison, results, option, arms) for option, arms in pivots.items())]


def _varied(declared: Arm) -> list[str]:
    return [option for option, tried in declared.grid.items() if len(tried) > 1]


def _pivot(comparison: Comparison, results: Results, option: str, arms: list[str]) -> str:
    tried = [item for arm in arms for item in comparison.arms[arm].grid[option]]
    columns: dict[Any, str] = {}
    for item in sorted(tried, key=_order):
        columns.setdefault(_same(item), str(item))
    rows, spans = [], {}
    for arm in arms:
        points = comparison.arms[arm].points()
        spans[arm] = _span(comparison.arms[arm].grid[option])
        for rest in dict.fromkeys(in_words(_without(point, option)) for point in points):
            row = {_same(p[option]): p for p in points if in_words(_without(p, option)) == rest}
            cells = [cell(comparison, results, arm, row[column]) if column in row else "" for column in columns]
            scores = [screened(comparison, results, arm, point) for point in row.values()]
            rows.append([arm, rest, *cells, *_losses(comparison, scores)])
    head = ["optimizer", "point", *(f"{option} {text}" for text in columns.values()), "mean loss", "largest loss"]
    if all(row[1] == "-" for row in rows):
        head, rows = [head[0], *head[2:]], [[row[0], *row[2:]] for row in rows]
    text = table(head, rows)
    if len(set(spans.values())) > 1:
        wide = "; ".join(f"{arm}: {'-' if span is None else f'{span:g}'}" for arm, span in spans.items())
        text += (
            f"\n\nFrom the smallest to the largest {option} it is a factor of {wide}. Losses over a narrow grid "
            "are small for that reason alone."
        )
    return text


def cell(comparison: Comparison, results: Results, arm: str, point: Mapping[str, Any]) -> str:
    """Return a grid point's metric, or why it has none."""
    score = screened(comparison, results, arm, point)
    if score is not None:
        return number(score)
    runs = [run for run in comparison.screen_runs() if run.arm == arm and run.point == point]
    if any(results.failed(run) for run in runs):
        return "failed"
    return "not a number" if all(results.finished(run) for run in runs) else "-"


def _losses(comparison: Comparison, scores: list[float | None]) -> list[str]:
    known = [score for score in scores if score is not None]
    if len(known) < len(scores) or len(known) < 2:
        return ["-", "-"]
    best = (max if comparison.maximize else min)(known)
    losses = [abs(score - best) for score in known]
    return [number(sum(losses) / (len(losses) - 1)), number(max(losses))]


def _span(tried: list[Any]) -> float | None:
    """Return the ratio of the largest to the smallest value; None unless all are positive numbers."""
    numbers = [as_number(item) for item in tried]
    known = [n for n in numbers if n is not None and n > 0]
    return float(f"{max(known) / min(known):.3g}") if len(known) == len(tried) else None


def _without(point: Mapping[str, Any], option: str) -> dict[str, Any]:
    return {key: item for key, item in point.items() if key != option}


def _same(item: Any) -> Any:
    """Return what equal values have in common: 1e-3 is a text in YAML, and 0.001 is a number."""
    return str(item) if (found := as_number(item)) is None else found


def _order(item: Any) -> tuple[bool, float, str]:
    found = as_number(item)
    return (found is None, found or 0.0, str(item))
