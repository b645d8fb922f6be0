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
from comparison.results import Results, best_points, screened


@dataclass(frozen=True)
class Panel:
    """One comparison.

    Attributes:
        name: Of its YAML file.
        dataset: What `dataset_name` was when it ran: the name of a local folder.
        title: Above the panel.
        unit: Of the metric.
        percent: Whether the metric is a share.
        arms: The optimizers to draw, each with its line's colour and style.
    """

    name: str
    dataset: str
    title: str
    unit: str
    percent: bool
    arms: dict[str, tuple[str, str]]


PANELS = (
    Panel(
        "outliers_mlp",
        "cifar10",
        "An outlier in every batch (images, MLP)",
        "validation accuracy, %",
        True,
        {
            "adamw, without outliers": ("tab:gray", ":"),
            "adamw": ("tab:blue", "-"),
            "adamw, clipped at 0.1": ("tab:blue", "--"),
            "fngd adam, ranked, refresh 10, damping 0.1": ("tab:red", "-"),
            "fngd adam, every step, shuffled": ("tab:red", ":"),
        },
    ),
    Panel(
        "label_noise_mlp",
        "cifar10",
        "40 % of the labels random (images, MLP)",
        "accuracy on validation labels as noisy, %",
        True,
        {
            "adamw": ("tab:blue", "-"),
            "adamw, gce": ("tab:green", "-"),
            "fngd adam, every step": ("tab:red", "-"),
            "fngd adam, sketched": ("tab:red", "--"),
            "fngd adam, every step, shuffled": ("tab:red", ":"),
        },
    ),
    Panel(
        "multi30k_small",
        "multi30k",
        "Multi30K, two epochs (Transformer)",
        "validation BLEU",
        False,
        {
            "adamw": ("tab:blue", "-"),
            "soap": ("tab:green", "-"),
            "muon": ("tab:orange", "-"),
            "fngd, w = 1": ("tab:red", ":"),
            "fngd": ("tab:red", "-"),
        },
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
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        draw(axes, panel, results_dir)
    path = results_dir / "summary.png"
    figure.savefig(path, dpi=120)
    print(f"Wrote {path}.")


def draw(axes: Axes, panel: Panel, results_dir: Path) -> None:
    """Draw one comparison's screening: a line an optimizer, its learning rates as multiples of its best one."""
    overrides = {"dataset_name": panel.dataset}
    comparison = load(RECIPES / "configs" / "compare" / f"{panel.name}.yaml", overrides, list(panel.arms))
    results = Results(results_dir / f"{panel.name}.jsonl")
    for arm, (color, style) in panel.arms.items():
        points = curve(comparison, results, arm)
        values = [100 * y if panel.percent else y for _, y in points]
        axes.plot([x for x, _ in points], values, color=color, linestyle=style, marker=".", label=arm)
    axes.set(xscale="log", xlabel="learning rate / the optimizer's best", ylabel=panel.unit, title=panel.title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def curve(comparison: Comparison, results: Results, arm: str) -> list[tuple[float, float]]:
    """Return the points of an optimizer that have a number, by their learning rates over the best one."""
    best = best_points(comparison, results).get(arm)
    if best is None:
        return []
    rates = {name: as_number(point["learning_rate"]) for name, point in enumerate(comparison.arms[arm].points())}
    unit = as_number(best["learning_rate"])
    scores = [screened(comparison, results, arm, point) for point in comparison.arms[arm].points()]
    return sorted(
        (rates[place] / unit, score)  # type: ignore[operator]
        for place, score in enumerate(scores)
        if score is not None
    )


if __name__ == "__main__":
    main()
