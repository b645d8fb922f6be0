"""Processes with uneven numbers of batches: torch's Join, and what is said without it."""

from pathlib import Path

import pytest

from tests.distributed.harness import SETTINGS
from tests.distributed.launch import launch


@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", [2, 3])
def test_uneven_batches(world: int, subtests: pytest.Subtests, tmp_path: Path) -> None:
    found = launch("tests.distributed.uneven", world, tmp_path)
    for name, settings in SETTINGS.items():
        with subtests.test(name):
            outcome = found["joined"][name]
            assert outcome["agree"] == [True] * 4, "parameters or states differ between the processes"
            assert outcome["moved"] > 0.05
            assert outcome["skipped"] == 1
            if settings["sharing"] == "replay":  # which counts places by processes, also of those that have ended
                assert outcome["shared since"] == 4 if "coefficient_steps" not in settings else 3 + 2 * (world - 1) - 1
            else:
                assert outcome["error"] <= (0.0 if world == 2 else 1e-12)
    with subtests.test("the engine alone"):
        assert found["followed"] == [True, True]
    with subtests.test("no batch at all"):
        assert found["nothing"] == {"clipped": True, "never": True, "replay": True}
    with subtests.test("another way into the context is refused"):
        told = found["refused"]
        for sharing in ("clipped", "never"):
            assert "Join([model, optimizer])" in told.pop(f"model.join(), {sharing}")
        assert told.pop("model.join(), uniform") == "no error"
        assert "FNGD is the first" in told.pop("FNGD first")
        assert "the step has 2 forward passes" in told.pop("accumulation")
        assert told == {}
    with subtests.test("a process that waits for nobody is told why"):
        assert "another number of optimizer steps" in found["hangs"]
