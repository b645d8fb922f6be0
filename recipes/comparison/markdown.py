"""Tables and numbers as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from comparison.results import mean


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def filled_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table without the columns in which every row has a dash."""
    kept = [place for place in range(len(head)) if any(row[place] != "-" for row in rows)]
    return table([head[place] for place in kept], [[row[place] for place in kept] for row in rows])


def number(value: float | None) -> str:
    """Return a number in four digits."""
    return "-" if value is None else f"{value:.4g}"


def spread(values: Iterable[float | None]) -> str:
    """Return mean, standard deviation and range of the values over the seeds."""
    values = list(values)
    known = [v for v in values if v is not None]
    if (center := mean(values)) is None:
        return "not a number" if known else "-"
    if len(known) == 1:
        return number(center)
    return f"{number(center)} ± {statistics.stdev(known):.2g} ({number(min(known))} to {number(max(known))})"


def as_number(item: object) -> float | None:
    """Return what YAML gave as a number, or as the text of one (1e-3); None for anything else."""
    if isinstance(item, bool):
        return None
    try:
        return float(item)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
