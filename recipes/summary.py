"""Draw the README's plot: what each comparison's optimizers reach, against their learning rates.

    python recipes/summary.py

Reads the lines under recipes/results/ and writes summary.png there; nothing is run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from comparison.markdown import as_number
from comparison.plan import RECIPES, Comparison, load
from comparison.results import Results, best_points, value


@dataclass(frozen=True)
class Panel:
    """One comparison.

    Attributes:
        name: Of its YAML file.
        dataset: What `dataset_name` was when it ran: the name of a local folder.
        title: Above the panel.
        label: Of the axis of the metric.
        unit: What a label's unit is in the metric's.
        arms: The optimizers to draw, keys of `STYLES`.
    """

    name: str
    dataset: str
    title: str
    label: str
    unit: float
    arms: tuple[str, ...]


STYLES = {
    "adamw": ("tab:blue", "-"),
    "adamw, bounded loss": ("tab:blue", ":"),
    "adamw, without outliers": ("tab:gray", ":"),
    "adamw, gce": ("tab:green", "-"),
    "soap": ("tab:green", "-"),
    "muon": ("tab:orange", "-"),
    "muon, momentum 0.9": ("tab:orange", "--"),
    "muon, clipped outputs": ("tab:orange", "--"),
    "adamw, clipped outputs": ("tab:blue", "-."),
    "fngd": ("tab:red", "-"),
    "fngd, clipped outputs": ("tab:red", "-."),
    "fngd, w = 1": ("tab:red", ":"),
    "fngd, ranked": ("tab:red", "--"),
    "fngd adam": ("tab:purple", "-"),
    "adamw, all scaled": ("tab:gray", ":"),
    "fngd adam, every step": ("tab:red", "-"),
    "fngd adam, every step, shuffled": ("tab:red", ":"),
    "fngd adam, sketched": ("tab:red", "--"),
}
"""Colour and style of an optimizer's line."""

BLEU = ("test BLEU", 1)
ACCURACY = ("test accuracy, %", 0.01)
REMEDIES = (
    "adamw",
    "adamw, bounded loss",
    "adamw, clipped outputs",
    "muon",
    "muon, clipped outputs",
    "fngd",
)
"""What there is against outsized samples of an MLP, and the same optimizers without."""
PANELS = (
    Panel(
        "outliers_mlp",
        "cifar10",
        "An outlier in every batch (images, MLP)",
        *ACCURACY,
        ("adamw, without outliers", *REMEDIES, "fngd, ranked"),
    ),
    Panel(
        "outliers_vit",
        "cifar10",
        "An outlier in every batch (images, ViT)",
        *ACCURACY,
        (
            "adamw, without outliers",
            "adamw",
            "adamw, clipped outputs",
            "muon",
            "muon, clipped outputs",
            "fngd",
            "fngd, clipped outputs",
            "fngd adam",
        ),
    ),
    Panel(
        "unscaled_mlp",
        "cifar10",
        "5 % of the images unscaled (MLP)",
        *ACCURACY,
        ("adamw, all scaled", *REMEDIES, "fngd adam"),
    ),
    Panel(
        "outliers_translation",
        "multi30k",
        "An outlier in every batch (translation)",
        *BLEU,
        (
            "adamw",
            "adamw, bounded loss",
            "muon",
            "muon, clipped outputs",
            "fngd, w = 1",
            "fngd",
            "fngd, clipped outputs",
            "fngd, ranked",
        ),
    ),
    Panel(
        "label_noise_mlp",
        "cifar10",
        "40 % of the labels random (images, MLP)",
        *ACCURACY,
        (
            "adamw",
            "adamw, gce",
            "fngd adam, every step",
            "fngd adam, sketched",
            "fngd adam, every step, shuffled",
        ),
    ),
    Panel(
        "multi30k_small",
        "multi30k",
        "Multi30K, two epochs (Transformer)",
        *BLEU,
        ("adamw", "soap", "muon", "muon, momentum 0.9", "fngd, w = 1", "fngd", "fngd, ranked"),
    ),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw.

    Args:
        argv: The arguments behind the program's name; `sys.argv[1:]` where None.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results_dir", type=Path, default=RECIPES / "results", help="folder of the result files")
    results_dir = parser.parse_args(argv).results_dir
    figure = Figure(figsize=(13, 10.5), layout="constrained")
    for axes, panel in zip(figure.subplots(3, 2).flat, PANELS, strict=True):
        draw(axes, panel, results_dir)
    path = results_dir / "summary.png"
    figure.savefig(path, dpi=120)
    print(f"Wrote {path}.")


def draw(axes: Axes, panel: Panel, results_dir: Path) -> None:
    """Draw one comparison's screening: a line an optimizer, with a ring around the point that validation chose."""
    overrides = {"dataset_name": panel.dataset}
    comparison = load(RECIPES / "configs" / "compare" / f"{panel.name}.yaml", overrides, list(panel.arms))
    results = Results(results_dir / f"{panel.name}.jsonl")
    best = best_points(comparison, results)
    for arm in panel.arms:
        color, style = STYLES[arm]
        points = curve(comparison, results, arm, panel.unit)
        rates, scores = [rate for rate, _ in points], [score for _, score in points]
        axes.plot(rates, scores, color=color, linestyle=style, marker=".", label=arm)
        chosen = as_number(best[arm]["learning_rate"]) if arm in best else None
        ring = [point for point in points if point[0] == chosen]
        axes.scatter([x for x, _ in ring], [y for _, y in ring], s=60, facecolors="none", edgecolors=color)
    axes.set(xscale="log", xlabel="learning rate", ylabel=panel.label, title=panel.title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def curve(comparison: Comparison, results: Results, arm: str, unit: float) -> list[tuple[float, float]]:
    """Return an optimizer's points of the screening: the learning rate and the test metric, in units of `unit`."""
    points = []
    for run in comparison.screen_runs():
        score, rate = value(results.finished(run), comparison.test_metrics[0]), as_number(run.point["learning_rate"])
        if run.arm == arm and score is not None and rate is not None:
            points.append((rate, score / unit))
    return sorted(points)


if __name__ == "__main__":
    main()
