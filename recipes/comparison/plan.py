"""What a comparison consists of, from its YAML file to the command lines of its runs."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

RECIPES = Path(__file__).parents[1]
_OURS = ("seed", "output_dir")  # options that a comparison sets itself


@dataclass(frozen=True)
class Run:
    """One training: a child process of the recipe.

    Attributes:
        stage: "screen" or "final"; no part of what the run is, so that both stages share equal runs.
        arm: Name of the optimizer.
        point: The options of the grid point.
        seed: Seed.
        options: All options of the recipe, those included, except for the output folder.
        key: Equal for equal recipes, optimizers and options.
    """

    stage: str
    arm: str
    point: dict[str, Any]
    seed: int
    options: dict[str, Any]
    key: str

    @property
    def folder(self) -> str:
        """Name of the output folder."""
        return "-".join([*re.findall(r"[\w.]+", self.arm), self.key])

    def __str__(self) -> str:
        return " ".join([self.stage, self.arm, *([in_words(self.point)] if self.point else []), f"seed {self.seed}"])


@dataclass(frozen=True)
class Stage:
    """Options and seeds of the runs of a stage."""

    seeds: tuple[int, ...] = (0,)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """An optimizer: its options, and the values to try of some of them, in all combinations."""

    options: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)

    def points(self) -> list[dict[str, Any]]:
        """Return the grid points."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


@dataclass(frozen=True)
class Comparison:
    """A declared set of runs.

    Attributes:
        name: Name of the result files.
        recipe: The script; it takes `--seed`, `--output_dir` and the options, and writes `all_results.json`.
        metric: What selects the grid point, a measurement on the validation split.
        maximize: Whether more of it is better.
        test_metrics: What is reported of the best points, the one that decides first.
        curves: What is plotted, of the events in `trainer_state.json`.
        options: Options of all runs.
        screen: Stage that tries each grid point.
        final: Stage of the best grid points.
        arms: The optimizers.
        reference: The arm that others are measured against: its time of a step is 1, its final metric a target.
    """

    name: str
    recipe: Path
    metric: str
    maximize: bool
    test_metrics: tuple[str, ...]
    curves: tuple[str, ...]
    options: dict[str, Any]
    screen: Stage
    final: Stage
    arms: dict[str, Arm]
    reference: str

    def screen_runs(self) -> list[Run]:
        """Return the runs of the first stage: none of an arm whose grid has one point."""
        return [
            self._run("screen", arm, point, seed)
            for seed in self.screen.seeds
            for arm in self.arms
            if len(self.arms[arm].points()) > 1
            for point in self.arms[arm].points()
        ]

    def final_runs(self, best: Mapping[str, dict[str, Any]]) -> list[Run]:
        """Return the runs of the last stage, for the arms that have a best point."""
        return [
            self._run("final", arm, best[arm], seed) for seed in self.final.seeds for arm in self.arms if arm in best
        ]

    def _run(self, stage: str, arm: str, point: dict[str, Any], seed: int) -> Run:
        of_stage = self.screen if stage == "screen" else self.final
        options = self.options | of_stage.options | self.arms[arm].options | point | {"seed": seed}
        return Run(stage, arm, point, seed, options, run_key(self.recipe.name, arm, recorded(options)))


def load(path: Path, overrides: Mapping[str, Any] | None = None, arms: Sequence[str] | None = None) -> Comparison:
    """Read a comparison.

    Args:
        path: The YAML file. `base` names a recipe's own file of options, relative to it; `like` another comparison,
            beside it, whose keys it takes over where it has none; of `options` it takes over each one.
        overrides: Options of all runs that win over the file's.
        arms: Names of the optimizers to keep; by default all.

    Raises:
        ValueError: A key does not exist or is missing, a grid has no values, or an option is set in two places.
    """
    values = _read(path)
    known = {f.name for f in fields(Comparison)} - {"name"} | {"base"}
    _check_keys(str(path), values, known, {"recipe", "metric", "test_metrics", "final", "arms"})
    options = _mapping("options", values.get("options"))
    if "base" in values:
        base = path.parent / values["base"]
        options = _mapping(base, yaml.safe_load(base.read_text(encoding="utf-8"))) | options
    options.pop("output_dir", None)  # the base's
    found = {name: _arm(name, arm) for name, arm in _mapping("arms", values["arms"]).items()}
    unknown = [arm for arm in arms or () if arm not in found]
    if unknown:
        raise ValueError(f"{path} has no arms {', '.join(unknown)}; it has {', '.join(found)}.")
    if not found:
        raise ValueError(f"{path} has no arms; name at least one, with its options and grid.")
    reference = values.get("reference", next(iter(found)))
    if reference not in found:
        raise ValueError(f"{path} has the reference {reference!r}, which is no arm; the arms are {', '.join(found)}.")
    if values["metric"].startswith(("test_", "predict_")):
        raise ValueError(f"{path} has the metric {values['metric']!r}: a test split chooses nothing.")
    kept = {name: arm for name, arm in found.items() if arms is None or name in arms}
    comparison = Comparison(
        name=path.stem,
        recipe=RECIPES / values["recipe"],
        metric=values["metric"],
        maximize=values.get("maximize", True),
        test_metrics=tuple(values["test_metrics"]),
        curves=tuple(values.get("curves", (values["metric"],))),
        options=options,
        screen=_stage("screen", values.get("screen"), overrides or {}),
        final=_stage("final", values["final"], overrides or {}),
        arms=kept,
        reference=reference if reference in kept else next(iter(kept)),
    )
    for name, arm in comparison.arms.items():
        stages = (comparison.screen, comparison.final) if len(arm.points()) > 1 else (comparison.final,)
        for place in (stage.options for stage in stages):
            both = set(place) & (set(arm.options) | set(arm.grid))
            if both:
                raise ValueError(f"arm {name} and its stages both set {', '.join(sorted(both))}.")
    return comparison


def _read(path: Path) -> dict[str, Any]:
    values = _mapping(path, yaml.safe_load(path.read_text(encoding="utf-8")))
    if "like" not in values:
        return values
    other = _read(path.parent / values.pop("like"))
    options = [_mapping("options", each.get("options")) for each in (other, values)]
    return other | values | {"options": options[0] | options[1]}


def recorded(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as they are recorded: of local files and folders the name alone."""
    return {
        key: Path(value).name if isinstance(value, str) and "/" in value and Path(value).exists() else value
        for key, value in options.items()
    }


def run_key(recipe: str, arm: str, options: Mapping[str, Any]) -> str:
    """Return what tells runs apart: the recipe's name, the arm's, and the options as they are recorded."""
    identity = json.dumps([recipe, arm, options], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


def in_words(point: Mapping[str, Any]) -> str:
    """Return a grid point as text."""
    return ", ".join(f"{key} {value}" for key, value in point.items()) or "-"


def _stage(name: str, value: Any, overrides: Mapping[str, Any]) -> Stage:
    values = _mapping(name, value)
    _check_keys(name, values, {"seeds", "options"}, set())
    seeds = tuple(values.get("seeds", (0,)))
    if not seeds:
        raise ValueError(f"{name} has no seeds.")
    # Those of the command line go in here: options of the comparison would be hidden by the stage's.
    return Stage(seeds, {**_checked(name, values.get("options")), **overrides})


def _arm(name: str, value: Any) -> Arm:
    values = _mapping(name, value)
    _check_keys(f"arm {name}", values, {"options", "grid"}, set())
    grid = _checked(name, values.get("grid"))
    for key, tried in grid.items():
        if not isinstance(tried, list) or not tried:
            raise ValueError(f"arm {name}: the grid of {key} must be a list of values.")
    return Arm(_checked(name, values.get("options")), grid)


def _checked(where: str, value: Any) -> dict[str, Any]:
    options = _mapping(where, value)
    if any(key in options for key in _OURS):
        raise ValueError(f"{where} sets {' or '.join(_OURS)}, which a comparison sets itself.")
    return options


def _mapping(where: Any, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{where} holds a {type(value).__name__}; it must hold names and values.")
    return dict(value or {})


def _check_keys(where: str, values: Mapping[str, Any], known: set[str], needed: set[str]) -> None:
    if unknown := set(values) - known:
        raise ValueError(f"{where} has {', '.join(sorted(unknown))}; it may have {', '.join(sorted(known))}.")
    if missing := needed - set(values):
        raise ValueError(f"{where} lacks {', '.join(sorted(missing))}.")
