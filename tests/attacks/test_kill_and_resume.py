"""Runs that were killed and resumed equal those that nobody killed, and a state that is not whole would be noticed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_fngd import policy_names
from tests.attacks.dying_run import RUNS

ROOT = Path(__file__).parents[2]


def test_killed_runs_end_as_those_that_nobody_killed(tmp_path: Path, subtests: pytest.Subtests) -> None:
    command = [sys.executable, "-m", "tests.attacks.dying_run", *RUNS, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, timeout=250, capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {run.fngd["sharing"] for run in RUNS.values()} == set(policy_names())
    for name, run in RUNS.items():
        with subtests.test(name):
            assert None not in found[name]["resumed"]
            assert found[name]["passed over"] == sum("." in death.kind for death in run.deaths)
            if run.spoil is None:
                assert found[name]["differs"] == []
            else:
                assert "parameters" in found[name]["differs"]
