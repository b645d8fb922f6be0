"""The files of comparisons and the options beside them: what they say, and what is refused."""

import json
from pathlib import Path

import pytest
from transformers import TrainingArguments

import language_modeling
import text_classification
from common.arguments import parse
from common.command_line import words
from comparison.plan import RECIPES, load, recorded
from comparison.plot import series
from images import arguments as images
from tests.recipes.comparison_setting import Setting
from translation import arguments as translation

RECIPE_OPTIONS = {
    "translate.py": translation.DATACLASSES,
    "image_classification.py": images.DATACLASSES,
    "language_modeling.py": language_modeling.DATACLASSES,
    "text_classification.py": text_classification.DATACLASSES,
}
CONFIGS = sorted((RECIPES / "configs" / "compare").glob("*.yaml"))


def test_options_of_the_command_line_win_over_the_files(toy, capsys):
    toy.run("--set", "epochs=7", "mode=x", "--arms", "b")
    assert {line["arm"] for line in toy.lines()} == {"b"}
    assert {(line["options"]["epochs"], line["options"]["mode"]) for line in toy.lines()} == {(7, "x")}
    capsys.readouterr()
    toy.run("--list", "--set", "epochs=7", "mode=x")
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "to do    screen a lr 0.1 seed 0"
    assert out[3] == "finished screen b lr 0.4 seed 0"
    assert out[-1] == "3 final runs each of a, when their grids are screened"


def test_base_is_a_recipes_own_file(toy):
    (toy.folder / "base.yaml").write_text("width: 3\ndepth: 2\noutput_dir: elsewhere\n", encoding="utf-8")
    toy.values |= {"base": "base.yaml", "options": {"width": 5, "mode": ""}}
    assert load(Path(toy.argv[0])).options == {"width": 5, "depth": 2, "mode": ""}


def test_a_comparison_like_another_has_its_keys_and_options(toy):
    toy.values["options"] = {"width": 1, "depth": 1}
    file = Path(toy.argv[0])
    for name, changes in {"like": {"like": file.name, "options": {"depth": 2}}, "more": {"like": "like.yaml"}}.items():
        file.with_stem(name).write_text(json.dumps(changes), encoding="utf-8")
    first, more = load(file), load(file.with_stem("more"))
    assert (more.options, more.name) == ({"width": 1, "depth": 2}, "more")
    assert (more.arms, more.final) == (first.arms, first.final)


def test_folders_have_plain_names(toy):
    toy.values["arms"] = {"a, w = 1/2": {"options": {"lr": 0.1}}}
    (run,) = load(Path(toy.argv[0])).final_runs({"a, w = 1/2": {}})[:1]
    assert run.folder == f"a-w-1-2-{run.key}"


def test_words_are_the_recipes(tmp_path):
    options = {"a": 1, "b": [1, 2], "c": {"d": 1}, "e": None, "f": False, "g": "1e-3"}
    assert words(options) == ["--a=1", "--b", "1", "2", '--c={"d": 1}', "--f=False", "--g=1e-3"]
    assert recorded({"a": str(tmp_path), "b": "user/name"}) == {"a": tmp_path.name, "b": "user/name"}


def test_seconds_of_a_curve_are_those_of_its_steps():
    record = {
        "curve": [{"step": 3, "epoch": 1, "m": 5.0}, {"step": 6, "epoch": 2}],
        "metrics": {"step_seconds_mean": 2.0},
    }
    assert series(record, "m", "epoch") == ([1], [5.0])
    assert series(record, "m", "seconds") == ([6.0], [5.0])
    assert series(record | {"metrics": {}}, "m", "seconds") == ([], [])


@pytest.mark.parametrize(
    ("changes", "argv", "message"),
    [
        ({"metrics": 1}, [], "has metrics; it may have arms, base"),
        ({"arms": {"a": {"gird": {}}}}, [], "arm a has gird"),
        ({"arms": {"a": {"grid": {"lr": 1}}}}, [], "the grid of lr must be a list"),
        ({"arms": {"a": {"grid": {"seed": [1]}}}}, [], "sets seed or output_dir"),
        ({"arms": {"a": {"grid": {"epochs": [1]}}}}, [], "arm a and its stages both set epochs"),
        ({"arms": ["a"]}, [], "arms holds a list"),
        ({"final": {"seeds": []}}, [], "final has no seeds"),
        ({}, ["--arms", "c"], "no arms c; it has a, b"),
        ({}, ["--set", "lr=1"], "arm a and its stages both set lr"),
    ],
)
def test_bad_files_are_refused(tmp_path, changes, argv, message):
    toy = Setting(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        toy.run(*argv)
    assert toy.calls() == 0


def test_a_missing_key_is_named(toy):
    del toy.values["metric"]
    with pytest.raises(ValueError, match=r"toy\.yaml lacks metric"):
        toy.run()


@pytest.mark.parametrize("recipe", RECIPE_OPTIONS)
def test_every_recipe_can_be_asked_for_help(recipe, capsys):
    with pytest.raises(SystemExit, match="0"):
        parse(RECIPE_OPTIONS[recipe], ["--help"])
    assert "--layer_types" in capsys.readouterr().out


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_declared_comparisons_parse_and_have_equal_grids(tmp_path, path):
    comparison = load(path)
    runs = comparison.screen_runs()
    runs += comparison.final_runs({name: arm.points()[0] for name, arm in comparison.arms.items()})
    for run in runs:
        parsed = parse(RECIPE_OPTIONS[comparison.recipe.name], [*words(run.options), f"--output_dir={tmp_path}"])
        (training,) = [arguments for arguments in parsed if isinstance(arguments, TrainingArguments)]
        assert training.seed == run.seed
    assert len({len(arm.points()) for arm in comparison.arms.values() if arm.grid}) <= 1
    assert len({run.key for run in runs}) == len({(run.arm, str(run.options)) for run in runs})
