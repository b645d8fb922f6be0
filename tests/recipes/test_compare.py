"""The comparison: what it runs, what it never runs twice, what it selects, what it says."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import compare
from comparison import runner
from comparison.plan import load
from comparison.plot import series
from comparison.report import report
from comparison.results import Results


def test_the_best_point_by_validation_goes_on_with_more_seeds(toy, capsys):
    assert toy.run() == 0
    lines = toy.lines()
    assert [(line["stage"], line["arm"], line["point"]["lr"], line["seed"]) for line in lines] == [
        *[("screen", "a", lr, 0) for lr in (0.1, 0.3, 0.2)],
        *[("screen", "b", lr, 0) for lr in (0.4, 0.2, 0.3)],
        *[("final", arm, lr, seed) for seed in (1, 2, 4) for arm, lr in (("a", 0.3), ("b", 0.4))],
    ]
    assert [line["options"]["epochs"] for line in lines] == [1] * 6 + [3] * 6
    assert lines[0]["metrics"]["test_score"] == -1.0
    assert "list" not in lines[0]["metrics"]
    assert lines[0]["curve"][0] == {"epoch": 1, "step": 4, "eval_score": 0.0}
    out = capsys.readouterr().out
    assert "[6/6] screen b lr 0.3 seed 0: eval_score 3" in out
    assert "[6/6] final b lr 0.4 seed 4: eval_score 8" in out


def test_the_report_has_means_spreads_and_seconds(toy):
    toy.run()
    # Seeds 1, 2, 4 add themselves to the score 10 lr; the curve's best epoch is the second one, of the same score.
    scores = ["eval_score", "eval_score, best epoch", "test_score"]
    assert toy.row("optimizer")[4:] == [*scores, "seconds", "seconds a step"]
    spread = "5.333 ± 1.5 (4 to 7)"
    assert toy.row("a") == ["a", "lr 0.3", "3", "3", spread, spread, "-5.333 ± 1.5 (-7 to -4)", "6", "0.5"]
    assert toy.row("b")[6] == "-6.333 ± 1.5 (-8 to -5)"
    assert toy.row("a", "## Grids") == ["a", "1", "2", "3", "", "1.5", "2"]
    assert "sacreBLEU `sig`." in toy.page()
    assert (toy.folder / "results" / "toy.png").read_bytes().startswith(b"\x89PNG")
    before = toy.page()
    (toy.folder / "results" / "toy.md").unlink()
    assert toy.run("--report") == 0
    assert toy.page() == before
    assert toy.calls() == 12


def test_a_finished_run_is_never_repeated(toy, capsys):
    toy.run()
    assert toy.run() == 0
    assert toy.calls() == 12
    assert "6 of 6 runs have finished before." in capsys.readouterr().out
    toy.values["final"]["seeds"] = [1, 2, 4, 5]
    toy.values["arms"]["a"]["grid"]["lr"] = [0.1, 0.3, 0.2, 0.25]
    toy.run()
    assert toy.calls() == 12 + 2 + 1
    toy.values["options"]["width"] = 7  # other options are other runs
    toy.run()
    assert toy.calls() == 15 + 7 + 8


def test_runs_that_ended_unrecorded_are_read_and_a_line_cut_off_is_replaced(toy):
    toy.run()
    file = toy.folder / "results" / "toy.jsonl"
    text = file.read_text(encoding="utf-8")
    file.write_text(text[: len(text) * 5 // 6 - 50], encoding="utf-8")
    with pytest.raises(json.JSONDecodeError):
        toy.lines()
    toy.run()
    assert toy.calls() == 12
    page = toy.page()
    file.unlink()
    toy.run()
    assert toy.calls() == 12
    assert toy.page() == page
    assert all(line["seconds"] is None for line in toy.lines())


def test_a_failure_is_recorded_the_others_go_on_and_it_is_tried_again(toy, capsys):
    toy.values["arms"]["a"]["grid"]["lr"] = [0.1, 5, 0.2]
    toy.values["arms"]["c"] = {"grid": {"lr": [2, 3, 4]}}
    assert toy.run() == 1
    assert toy.calls() == 9 + 6
    failed = [line for line in toy.lines() if line["status"] == "failed"]
    assert [(line["arm"], line["point"]["lr"]) for line in failed] == [("a", 5), ("c", 2), ("c", 3), ("c", 4)]
    assert failed[0]["error"] == "exit code 1: lr 5.0 is too large"
    out = capsys.readouterr().out
    assert "screen a lr 5 seed 0: FAILED, exit code 1: lr 5.0 is too large (see " in out
    assert "c: no grid point finished with a number" in out
    assert "- Failed: screen a lr 5 seed 0 (exit code 1: lr 5.0 is too large)." in toy.page()
    assert "- No finished final run: `c`." in toy.page()
    assert toy.row("a")[1] == "lr 0.2"
    assert toy.row("a", "## Grids")[1:3] == ["1", "2"]
    assert "failed" in toy.row("a", "## Grids")

    (toy.folder / "out" / "repaired").touch()
    assert toy.run() == 0
    assert toy.calls() == 15 + 4 + 6  # the point 5 wins now, and c has final runs
    assert toy.row("a")[1] == "lr 5"
    assert "Failed" not in toy.page()


def test_a_run_without_the_metric_has_failed(toy):
    toy.values["options"]["mode"] = "silent"
    assert toy.run() == 1
    assert {line["error"] for line in toy.lines()} == {"all_results.json has no eval_score"}


def test_a_score_that_is_no_number_is_never_the_best(toy):
    toy.values |= {"options": {"mode": "nan"}, "maximize": False}
    toy.values["arms"]["a"]["grid"]["lr"] = [0.05, 0.3, 0.2]
    assert toy.run() == 0
    assert toy.row("a")[1] == "lr 0.2"  # the lowest of the others
    assert toy.row("b")[1] == "lr 0.2"
    assert toy.row("a", "## Grids")[1] == "not a number"
    assert "NaN" not in (toy.folder / "results" / "toy.jsonl").read_text(encoding="utf-8")


def test_an_interrupted_run_starts_again_where_its_checkpoint_is(toy):
    toy.values |= {"options": {"mode": "interrupted"}, "arms": {"a": {"options": {"lr": 0.1}}}, "final": {"seeds": [1]}}
    command = [sys.executable, compare.__file__, *toy.argv]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as parent:
        deadline = time.monotonic() + 150
        while not (begun := list((toy.folder / "out").glob("*/checkpoint-1"))) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert begun
        os.kill(parent.pid, signal.SIGTERM)  # the child sleeps for longer than this waits
        assert b"start again to go on" in parent.communicate(timeout=50)[0]
    assert parent.returncode == 1
    assert not (toy.folder / "results" / "toy.jsonl").exists()
    assert toy.run() == 0
    (line,) = toy.lines()
    assert (line["status"], line["resumed"]) == ("finished", True)
    assert toy.calls() == 2


def test_a_run_that_the_time_cuts_off_leaves_its_curve_and_goes_on(toy, capsys):
    toy.values |= {"options": {"mode": "slow"}, "arms": {name: {"options": {"lr": 0.1}} for name in "ab"}}
    toy.values["final"] = {"seeds": [1], "options": {"epochs": 3}}
    start = time.monotonic()
    assert toy.run("--minutes=0.1") == 0
    assert time.monotonic() - start < 50
    assert (
        "final a seed 1: out of time at step 4 of 12, eval_score 7\nOut of time: 1 of 2 runs" in capsys.readouterr().out
    )
    (line,) = toy.lines()
    assert (line["status"], line["step"], line["max_steps"]) == ("unfinished", 4, 12)
    assert line["curve"] == [{"epoch": 1, "step": 4, "loss": 1}, {"epoch": 1, "step": 4, "eval_score": 7.0}]
    assert series(line, "eval_score", "seconds") == ([2.0], [7.0])
    assert toy.row("a", "## Unfinished runs") == ["a", "-", "1", "4", "12", "7", "7", "0.5"]
    assert "- No finished final run: `a`, `b`." in toy.page()
    toy.run("--list")
    assert "cut off  final a seed 1\nto do    final b seed 1\n" in capsys.readouterr().out

    (toy.folder / "out" / "repaired").touch()
    assert toy.run("--minutes=5") == 0
    assert [(line["arm"], line["status"], line["resumed"]) for line in toy.lines()[1:]] == [
        ("b", "finished", False),  # the least advanced one first
        ("a", "finished", True),
    ]
    assert "Unfinished" not in toy.page()


def test_what_other_code_left_is_no_result(toy, monkeypatch):
    toy.values |= {"arms": {"a": {"options": {"lr": 0.1}}}, "final": {"seeds": [1]}}
    assert toy.run() == 0
    (toy.folder / "results" / "toy.jsonl").unlink()
    monkeypatch.setattr(runner, "code_version", lambda: "another")
    assert toy.run() == 0
    assert toy.calls() == 2
    assert len(list((toy.folder / "out").glob("a-*-another"))) == 1


def test_the_version_is_that_of_every_file(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "RECIPES", tmp_path)
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder" / "a.py"
    seen = {runner.code_version()}
    for text in ("x = 1", "x = 2"):
        file.write_text(text, encoding="utf-8")
        seen.add(runner.code_version())
    file.rename(tmp_path / "folder" / "b.py")
    seen.add(runner.code_version())
    assert len(seen) == 4
    assert runner.code_version() in seen


def test_jobs_run_side_by_side(toy):
    toy.values["options"]["mode"] = "meet"
    assert toy.run("--jobs=2") == 0
    assert "Some runs were made side by side" in toy.page()


def test_remarks_come_with_their_causes_alone(toy):
    toy.values["arms"]["b"]["options"]["bias"] = 1
    toy.values["arms"]["a"]["grid"]["lr"] = [0.1, 0.3, 0.35, 0.2]
    toy.values["arms"]["b"]["grid"]["lr"] = [0.2, 4]
    (toy.folder / "out").mkdir()
    (toy.folder / "out" / "repaired").touch()
    toy.run()
    assert "- The grids are not of equal size: `a` 4, `b` 2.\n" in toy.page()
    assert "edge" in toy.page()  # 0.35 of a
    assert "overlap" not in toy.page()  # 7.5 at most for a, 41 at least for b
    toy.values["arms"]["a"]["grid"]["lr"] = [0.1, 0.3, 0.2, 0.35]
    toy.values["arms"]["b"]["grid"]["lr"] = [0.1, 0.2, 0.3, 0.4]
    toy.run()
    assert "equal size" not in toy.page()
    assert "- The best lr of `b`, 0.4, lies at the edge of its grid.\n" in toy.page()
    assert (
        "- These neighbours in test_score differ by less than their seeds do, their ranges overlap: `a` and `b`.\n"
        in toy.page()
    )
    assert "one seed" not in toy.page()
    toy.values["final"]["seeds"] = [1]
    toy.run()
    assert "- There is one seed: no spread." in toy.page()
    assert "overlap" not in toy.page()


def test_a_page_is_of_all_arms_and_is_not_replaced_by_an_empty_one(toy):
    toy.run()
    page = toy.page()
    toy.run("--arms", "a")
    assert toy.page() == page
    with pytest.raises(SystemExit):
        toy.run("--report", "--set", "bias=7")
    assert toy.page() == page


def test_a_screening_seed_among_the_final_ones_is_told(toy):
    toy.run()
    assert "final seed too" not in toy.page()  # the screening has seed 0
    toy.values["final"]["seeds"] = [0, 1]
    toy.run()
    assert "- Seed 0 chose the points and is a final seed too" in toy.page()


def test_a_report_on_what_has_not_run_says_so(toy):
    comparison = load(Path(toy.argv[0]))
    page = report(comparison, Results(toy.folder / "nothing.jsonl"))
    assert "- 6 runs of the screening are missing." in page
    assert "- No finished final run: `a`, `b`." in page
    assert "| a |" not in page


def test_an_arm_of_one_point_is_not_screened_and_a_run_of_both_stages_is_made_once(toy):
    toy.values["arms"] = {"a": {"options": {"lr": 0.1, "epochs": 2}}, "b": {"grid": {"lr": [0.1, 0.2]}}}
    toy.values |= {"options": {"mode": "", "epochs": 1}, "final": {"seeds": [0, 1]}}
    toy.run()  # the screening sets the epochs too, which is nothing to a
    stages = [("screen", "b"), ("screen", "b"), ("final", "a"), ("final", "a"), ("final", "b")]
    assert [(line["stage"], line["arm"]) for line in toy.lines()] == stages
    assert [line["options"]["epochs"] for line in toy.lines()] == [1, 1, 2, 2, 1]
    assert toy.row("b")[3] == "2"
