"""The results that are kept beside the recipes: they can be read, and the plot of the README is drawn from them."""

import json
import shutil

import pytest
from matplotlib.figure import Figure

import summary
from comparison.plan import RECIPES, load, run_key

RESULTS = RECIPES / "results"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_every_line_is_of_an_arm_that_is_declared(path):
    comparison = load(RECIPES / "configs" / "compare" / f"{path.stem}.yaml")
    for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        assert record["arm"] in comparison.arms
        assert record["key"] == run_key(comparison.recipe.name, record["arm"], record["options"])
        assert record["options"].items() >= {**comparison.arms[record["arm"]].options, **record["point"]}.items()


PANELS = [panel for panels, _ in summary.FIGURES.values() for panel in panels]


@pytest.mark.parametrize("panel", PANELS, ids=[f"{panel.name}, {panel.title}" for panel in PANELS])
def test_every_line_of_a_panel_has_points_and_one_that_was_chosen(panel):
    axes = Figure().subplots()
    summary.draw(axes, panel, RESULTS)
    assert [line.get_label() for line in axes.get_lines()] == list(panel.arms)
    for line, ring in zip(axes.get_lines(), axes.collections, strict=True):
        points = list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        assert len(points) > 1
        assert points == sorted(points)
        assert all(0 < y < 100 for _, y in points)
        assert [tuple(point) for point in ring.get_offsets()] in [[point] for point in points]


def test_the_plots_are_written_beside_the_results(tmp_path):
    for name in {panel.name for panel in PANELS}:
        shutil.copy(RESULTS / f"{name}.jsonl", tmp_path)
    summary.main(["--results_dir", str(tmp_path)])
    for name in summary.FIGURES:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_an_optimizer_without_runs_has_no_points(tmp_path):
    panel = PANELS[0]
    axes = Figure().subplots()
    summary.draw(axes, panel, tmp_path)
    assert [len(line.get_xdata()) for line in axes.get_lines()] == [0] * len(panel.arms)
