"""A sample of the killed runs, and whether the comparison would notice a state that is not whole."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_fngd import policy_names
from tests.attacks.kill_and_resume import KINDS, differences, draw_death, draw_settings, main

ROOT = Path(__file__).parents[2]


# The starts that are told by the arguments, one after the other: importing takes longer than a run.
SCRIPT = """
import json, sys
from hf_fngd import policy_names
from tests.attacks.kill_and_resume import main
print(json.dumps([main(json.loads(arguments)) for arguments in sys.argv[1:]]))
"""


def attack(*starts: list[str]) -> list[int]:
    """What the starts return. In a process of its own, since it forks and may have no other threads."""
    command = [sys.executable, "-c", SCRIPT, *map(json.dumps, starts)]
    done = subprocess.run(command, cwd=ROOT, timeout=250, capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def read(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_resumed_runs_equal_those_that_nobody_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    # Short ones. They die in a file, in backward, in a shared step, at the switch, while an old checkpoint is deleted.
    runs = {"optimizer.pt": 1417, "backward": 608, "later": 1795, "switch": 1218, "deleting": 1402}
    # A run whose later steps depend on each of these parts: replayed sample weights, dropout.
    parts = ["rows", "rng"]
    kills, spoilt = tmp_path / "kills.jsonl", tmp_path / "spoilt.jsonl"
    start = [f"--output={kills}", "--runs", *map(str, runs.values())]
    codes = attack(start, [f"--output={spoilt}", "--runs", str(runs["later"]), "--spoil", *parts])
    lines = read(kills)
    with subtests.test("equal"):
        assert [line["kind"] for line in lines] == list(runs)
        assert [line["differences"] for line in lines] == [[]] * len(runs)
        assert codes[0] == 0
        assert {line["fngd"]["sharing"] for line in lines} == set(policy_names())
        assert {line["model"] for line in lines} == {"bert", "gpt2"}
        for line in lines:
            assert line["kind"] in [death["kind"] for death in line["deaths"]]
        resumed = [death["resumed_from"] for line in lines for death in line["deaths"]]
        assert sum(step is not None for step in resumed) >= len(runs) // 2
    with subtests.test("a second start repeats none of them"), monkeypatch.context() as patch:
        patch.setattr("tests.attacks.kill_and_resume.attack", None)
        assert main(start) == 0
        assert read(kills) == lines
    with subtests.test("a state that is not whole is noticed"):
        damaged = read(spoilt)
        assert codes[1] == 1
        assert [line["spoil"] for line in damaged] == parts
        for line in damaged:
            assert line["fngd"]["sharing"] == "replay"
            assert line["deaths"][-1]["resumed_from"] is not None
            assert line["differences"][0].startswith(".parameters")


NESTED = {"a": torch.tensor([1.0, torch.nan]), "b": [{"c": 1, "d": (2.0, float("nan"))}, None], "e": "x"}


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda v: v["a"].add_(1e-7), ".a: largest difference"),
        (lambda v: v.update(a=v["a"].double()), ".a: torch.float64 (2,), not torch.float32 (2,)"),
        (lambda v: v.update(a=v["a"][:1]), ".a: torch.float32 (1,)"),
        (lambda v: v.update(a=None), ".a: None, not tensor"),
        (lambda v: v.pop("e"), ": only in one: ['e']"),
        (lambda v: v["b"].append(1), ".b: 3 items, not 2"),
        (lambda v: v["b"][0].update(c=1.0), ".b[0].c: 1.0, not 1"),
        (lambda v: v["b"][0].update(d=(2.0, 0.0)), ".b[0].d[1]: 0.0, not nan"),
    ],
)
def test_differences_are_found_and_named(change: Any, where: str) -> None:
    def copy() -> dict[str, Any]:
        return {"a": NESTED["a"].clone(), "b": [dict(NESTED["b"][0]), None], "e": "x"}

    changed = copy()
    assert list(differences(changed, copy())) == []
    change(changed)
    (found,) = differences(changed, copy())
    assert found.startswith(where)


def test_draws_depend_on_seed_and_run_alone() -> None:
    assert draw_settings(0, 5) == draw_settings(0, 5) != draw_settings(1, 5)
    assert {draw_settings(0, run)["kind"] for run in range(len(KINDS))} == set(KINDS)


def test_a_death_comes_after_what_was_done() -> None:
    events = [("saved", 2, 0), ("backward", 3, 0), ("saved", 4, 0)]
    for seed in range(20):
        death = draw_death(random.Random(seed), "saved", events, 2)
        assert (death.kind, death.step) == ("saved", 4)
        assert draw_death(random.Random(seed), "switch", events, 3).kind == "saved"
        assert draw_death(random.Random(seed), "switch", events, 4).kind == "time"
