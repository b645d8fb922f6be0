"""Draw what each comparison's optimizers reach, against their learning rates.

    python recipes/summary.py

Reads the lines under recipes/results/, and writes summary.png, the plot of the README, and depth_rates.png there.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from comparison.markdown import as_number
from comparison.plan import RECIPES, Comparison, load
from comparison.results import Results, best_points, value


@dataclass(frozen=True)
class Panel:
    """One comparison.

    Attributes:
        name: Of its YAML file.
        title: What it shows.
        dataset: The name of the local folder that its data were read from.
        label: What is measured.
        unit: What a label's unit is in the metric's.
        arms: The optimizers to draw, keys of `STYLES`.
    """

    name: str
    title: str
    dataset: str
    label: str
    unit: float
    arms: tuple[str, ...]


STYLES = {
    "adamw": ("tab:blue", "-"),
    "adamw, warm-up": ("tab:blue", ":"),
    "adamw, bounded loss": ("tab:blue", ":"),
    "adamw, clipped outputs": ("tab:blue", "-."),
    "adamw, without outliers": ("tab:gray", ":"),
    "adamw, all scaled": ("tab:gray", ":"),
    "soap": ("tab:green", "-"),
    "muon": ("tab:orange", "-"),
    "muon, momentum 0.9": ("tab:orange", "--"),
    "fngd, w = 1, clipped outputs": ("tab:red", "--"),
    "fngd": ("tab:red", "-"),
    "fngd, muon": ("tab:pink", "-"),
    "fngd, muon, w = 1": ("tab:pink", ":"),
    "fngd adam": ("tab:purple", "-"),
}
"""Colour and style of an optimizer's line."""

CLIPPED = ("muon", "fngd, w = 1, clipped outputs", "fngd, muon", "fngd")
REMEDIES = ("adamw", "adamw, bounded loss", "adamw, clipped outputs", *CLIPPED)
"""What there is against outsized samples."""
PIXELS = ("cifar10", "test accuracy, %", 0.01)
PAIRS = ("multi30k", "test BLEU", 1)
PANELS = (
    Panel(
        "outliers_mlp",
        "An outlier in every batch (images, MLP)",
        *PIXELS,
        ("adamw, without outliers", *REMEDIES, "fngd adam"),
    ),
    Panel(
        "outliers_vit",
        "An outlier in every batch (images, ViT)",
        *PIXELS,
        ("adamw, without outliers", "adamw", "adamw, clipped outputs", "muon", "fngd, muon", "fngd", "fngd adam"),
    ),
    Panel(
        "unscaled_mlp",
        "5 % of the images unscaled (MLP)",
        *PIXELS,
        ("adamw, all scaled", *REMEDIES, "fngd adam"),
    ),
    Panel(
        "outliers_resnet",
        "An outlier in every batch (images, ResNet-20)",
        *PIXELS,
        ("adamw", "adamw, clipped outputs", "muon", "fngd, w = 1, clipped outputs", "fngd"),
    ),
    Panel(
        "unscaled_resnet",
        "5 % of the images unscaled (ResNet-20)",
        *PIXELS,
        ("adamw", "muon", "fngd, w = 1, clipped outputs", "fngd"),
    ),
    Panel(
        "outliers_translation",
        "An outlier in every batch (translation)",
        *PAIRS,
        ("adamw", "adamw, bounded loss", *CLIPPED, "fngd, muon, w = 1"),
    ),
    Panel(
        "multi30k_small",
        "Multi30K, two epochs (Transformer)",
        *PAIRS,
        ("adamw", "soap", "muon", "muon, momentum 0.9", "fngd, muon", "fngd"),
    ),
    Panel(
        "multi30k_long", "5,000 pairs, 30 epochs (Transformer)", *PAIRS, ("adamw", "fngd, muon, w = 1", "fngd, muon")
    ),
)
NATS = ("multi30k", "validation loss, nats a token", 1)
DEPTHS = tuple(
    Panel(
        "depth",
        f"{layers} + {layers} layers, one epoch",
        *NATS,
        (f"adamw, {layers} layers", *more, f"fngd, {layers} layers"),
    )
    for layers, more in ((2, ()), (4, ()), (6, ("adamw, 6 layers, warm-up", "muon, 6 layers")))
)
FIGURES = {"summary": (PANELS, 2), "depth_rates": (DEPTHS, 3)}
"""The panels of each figure, and how many there are in a row."""


def main(argv: Sequence[str] | None = None) -> None:
    """Draw all figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results_dir", type=Path, default=RECIPES / "results", help="folder of the result files")
    results_dir = parser.parse_args(argv).results_dir
    for name, (panels, columns) in FIGURES.items():
        rows = len(panels) // columns
        figure = Figure(figsize=(6.5 * columns, 3.5 * rows), layout="constrained")
        for axes, panel in zip(figure.subplots(rows, columns).flat, panels, strict=True):
            draw(axes, panel, results_dir)
        path = results_dir / f"{name}.png"
        figure.savefig(path, dpi=120)
        print(f"Wrote {path}.")


def draw(axes: Axes, panel: Panel, results_dir: Path) -> None:
    """Draw one comparison's screening: a line an optimizer, with a ring around the point that validation chose."""
    overrides = {"dataset_name": panel.dataset}
    comparison = load(RECIPES / "configs" / "compare" / f"{panel.name}.yaml", overrides, list(panel.arms))
    results = Results(results_dir / f"{panel.name}.jsonl")
    best = best_points(comparison, results)
    for arm in panel.arms:
        color, style = STYLES[re.sub(r", \d layers", "", arm)]
        points = curve(comparison, results, arm, panel.unit)
        rates, scores = [rate for rate, _ in points], [score for _, score in points]
        axes.plot(rates, scores, color=color, linestyle=style, marker=".", label=arm)
        chosen = as_number(best[arm]["learning_rate"]) if arm in best else None
        ring = [point for point in points if point[0] == chosen]
        axes.scatter([x for x, _ in ring], [y for _, y in ring], s=60, facecolors="none", edgecolors=color)
    axes.set(xscale="log", xlabel="learning rate", ylabel=panel.label, title=panel.title)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def curve(comparison: Comparison, results: Results, arm: str, unit: float) -> list[tuple[float, float]]:
    """Return an optimizer's points of the screening: the learning rate and the test metric, in units of `unit`.

    The metric is the mean over the seeds.
    """
    points = defaultdict(list)
    for run in comparison.screen_runs():
        score, rate = value(results.finished(run), comparison.test_metrics[0]), as_number(run.point["learning_rate"])
        if run.arm == arm and score is not None and rate is not None:
            points[rate].append(score / unit)
    return sorted((rate, statistics.mean(scores)) for rate, scores in points.items())


if __name__ == "__main__":
    main()
