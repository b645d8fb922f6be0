"""One command for one device: what is worth most first, within the time, and again to go on."""

import json
import re

import pytest
import torch

import paper
from comparison.plan import load
from tests.recipes.comparison_setting import Setting

PLAN = re.compile(r"^  (\d)\. .*: (?:([\d.]+) of ([\d.]+) minutes|done)$", re.MULTILINE)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Comparison of a fake recipe; the tests and the suite are done at once."""
    setting = Setting(tmp_path)
    setting.argv  # noqa: B018, writes the file
    monkeypatch.setattr(paper, "CONFIG", tmp_path / "toy.yaml")
    monkeypatch.setattr(paper.Paper, "_test", lambda self, deadline: 0)
    monkeypatch.setattr(paper.Paper, "_suite", lambda self, deadline: 0)
    return setting


def start(setting, *argv):
    return paper.main(["--toy", "--jobs=1", "--arms", "a", "b", f"--results_dir={setting.folder / 'results'}", *argv])


def test_every_arm_of_the_plan_is_declared_and_fits_the_time(tmp_path, capsys):
    assert paper.main(["--plan", "--minutes=25", f"--results_dir={tmp_path / 'none'}"]) == 0
    rows = PLAN.findall(capsys.readouterr().out)
    assert [row[0] for row in rows] == list("12345")
    assert sum(float(row[1]) for row in rows) == pytest.approx(25, abs=0.3)
    assert float(rows[1][1]) == 7.5  # of the suite no more than its share
    assert not (tmp_path / "none").exists()
    assert set(paper.ARMS) <= set(load(paper.CONFIG).arms)


def test_one_seed_at_the_middle_comes_first_in_the_mode_that_was_fastest(toy, capsys):
    assert start(toy) == 0
    lines = toy.lines()
    assert [(line["stage"], line["arm"], line["options"]["lr"]) for line in lines[:2]] == [
        ("final", "a", 0.3),
        ("final", "b", 0.2),
    ]
    assert {line["seed"] for line in lines[:2]} == {1}
    assert all(line["options"]["torch_compile_backend"] == "aot_eager" for line in lines)
    assert len(lines) == 2 + 6 + 5  # the grids, and the seeds that are left: 0.3 was the best of a
    first = [json.loads(line) for line in (toy.folder / "results" / "first_steps.jsonl").read_text().splitlines()]
    assert [line["point"]["torch_compile_backend"] for line in first[:2]] == [None, None]
    page = (toy.folder / "results" / "one_seed.md").read_text(encoding="utf-8")
    assert "`toy.jsonl`" in page
    capsys.readouterr()
    assert start(toy) == 0
    assert len(toy.lines()) == len(lines)
    plan = PLAN.findall(capsys.readouterr().out)
    assert [row[1] for row in plan[2:5]] == ["", "", ""]  # done


def test_estimates_are_of_what_ran(toy, capsys):
    (toy.folder / "results").mkdir()
    before = minutes(toy, capsys)
    record = {"arm": "a", "key": "k", "status": "unfinished", "metrics": {"step_seconds_mean": 24.0}}
    (toy.folder / "results" / "toy.jsonl").write_text(json.dumps(record) + "\n")
    assert minutes(toy, capsys) == pytest.approx(before * (24 + 0.12) / (2 * 0.12), rel=0.05)


def minutes(setting, capsys):
    assert start(setting, "--plan", "--set", "num_train_epochs=300") == 0
    return float(PLAN.findall(capsys.readouterr().out)[3][2])


def test_failures_are_counted(toy):
    toy.values["arms"]["b"]["grid"]["lr"] = [0.1, 5, 0.2]
    toy.argv  # noqa: B018
    assert start(toy) == 1
    assert toy.lines()[0]["status"] == "finished"


@pytest.mark.parametrize(("argv", "message"), [(["--minutes=0"], "above 0"), ([], "--toy rehearses")])
def test_what_cannot_run_is_refused(argv, message, capsys):
    if not argv and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit):
        paper.main(argv)
    assert message in capsys.readouterr().err


@pytest.mark.timeout(1200)  # some ten processes, each of which imports everything
def test_the_rehearsal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paper.Paper, "_train_grids", lambda self, deadline: 0)  # as one seed, more often
    argv = [
        "--toy",
        "--arms",
        "fngd",
        f"--results_dir={tmp_path}",
        "--minutes=60",
    ]  # whose shares a loaded machine keeps to
    assert paper.main(argv) == 0
    assert "skipped" in (tmp_path / "cuda_tests.txt").read_text() or torch.cuda.is_available()
    assert (tmp_path / "step_cost.md").read_text().count("| SGD-m |") == 6
    first = [json.loads(line) for line in (tmp_path / "first_steps.jsonl").read_text().splitlines()]
    assert [line["point"] for line in first] == [{"torch_compile_backend": mode} for mode in (None, "aot_eager")]
    assert all(line["metrics"]["step_seconds_median"] > 0 for line in first)
    (line,) = [json.loads(line) for line in (tmp_path / "multi30k.jsonl").read_text().splitlines()]
    assert {"eval_bleu", "predict_bleu", "best_predict_bleu"} <= line["metrics"].keys()
    (state,) = (tmp_path / "runs").glob(f"fngd-{line['key']}-*/trainer_state.json")
    assert "step_seconds_mean" in state.read_text()  # what a run that is cut off leaves of its pace
    assert "| fngd |" in (tmp_path / "one_seed.md").read_text()
    capsys.readouterr()
    assert paper.main(argv) == 0
    assert [row[1] for row in PLAN.findall(capsys.readouterr().out)[:4]] == [""] * 4
