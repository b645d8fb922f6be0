"""The curves of a comparison."""

from __future__ import annotations

from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure  # no pyplot: it would look for a display

from comparison.plan import Comparison
from comparison.results import Record, Results, best_points, step_seconds

MARKERS = ("", "o", "s", "^")


def plot(comparison: Comparison, results: Results, path: Path) -> None:
    """Draw the curves of the best points, by epochs and seconds: a line a seed (dashed: cut off).

    An arm has a colour, from the eleventh on a marker as well.
    """
    rows, palette, named = len(comparison.curves), colormaps["tab10"], set()
    figure = Figure(figsize=(11, 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False, sharey="row")
    for number, run in enumerate(comparison.final_runs(best_points(comparison, results))):
        record = results.finished(run) or results.unfinished(run)
        if record is None:
            continue
        round_, color = divmod(list(comparison.arms).index(run.arm), 10)
        look = {"color": palette(color), "marker": MARKERS[round_ % len(MARKERS)], "markersize": 3}
        look |= {"linestyle": "-" if record["status"] == "finished" else "--", "linewidth": 1.2, "alpha": 0.8}
        label = None if run.arm in named else run.arm
        named.add(run.arm)
        for row, metric in enumerate(comparison.curves):
            for column, unit in enumerate(("epoch", "seconds")):
                x, y = series(record, metric, unit)
                axes[row][column].plot(x, y, label=label, zorder=number + 2, **look)
    for row, metric in enumerate(comparison.curves):
        for column, unit in enumerate(("epoch", "seconds of optimizer steps")):
            axes[row][column].set(xlabel=unit, ylabel=metric if column == 0 else "")
            axes[row][column].grid(alpha=0.3)
    if axes[0][0].get_lines():
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=120)


def series(record: Record, metric: str, unit: str) -> tuple[list[float], list[float]]:
    """Return positions, in epochs or seconds, and values of a curve; nothing where its recipe took no time."""
    events = [event for event in record["curve"] if event.get(metric) is not None]
    y = [event[metric] for event in events]
    if unit == "epoch":
        return [event["epoch"] for event in events], y
    seconds = step_seconds(record)
    return ([], []) if seconds is None else ([seconds * event["step"] for event in events], y)
