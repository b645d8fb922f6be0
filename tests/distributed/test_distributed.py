"""Several processes against one that accumulates their micro-batches, and against each other."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.checks import SETTINGS
from tests.distributed.launch import launch

CHECKS = "tests.distributed.checks"


@pytest.mark.parametrize(
    ("mode", "world", "tolerance"), [("ddp", 2, 0.0), ("ddp", 4, 1e-12), ("fsdp2", 2, 1e-12), ("fsdp2_after", 2, 1e-12)]
)
def test_ranks_equal_one_process_that_accumulates(mode: str, world: int, tolerance: float, tmp_path: Path) -> None:
    found = launch(CHECKS, world, tmp_path, mode)
    assert len(found) == 2 * len(SETTINGS)
    for name, outcome in found.items():
        assert outcome["active"], name
        assert outcome["agree"], f"{name}: parameters, store, rho or phase differ between the ranks"
        assert outcome["error"] <= tolerance, name
        assert outcome["moved"] > 0.05, name
        assert outcome["missed"] == 0, name
        if world == 2 and mode == "ddp":
            assert outcome["same state"], name


@pytest.mark.parametrize("world", [2, 4])
def test_uniform_weights_give_the_gradient_of_the_whole_batch(world: int, tmp_path: Path) -> None:
    found = launch(CHECKS, world, tmp_path, "uniform_gradients")
    assert max(found.values()) < 1e-6


def test_one_collective_in_a_coefficient_step_and_none_in_a_shared_one(tmp_path: Path) -> None:
    found = launch(CHECKS, 2, tmp_path, "collectives")
    expected = [int(computes) for computes in found["coefficient steps"]]
    expected[0] += 1  # in which the processes learn how large their batches are
    assert found["collectives"] == expected
    assert 0 < sum(found["coefficient steps"]) < len(expected)


def test_a_rank_without_a_gradient_neither_hangs_nor_parts_from_the_others(tmp_path: Path) -> None:
    found = launch(CHECKS, 2, tmp_path, "empty_ranks")
    for case, outcome in found.items():
        assert outcome["agree"], case
        assert outcome["finite"], case
    assert {case: (outcome["skipped"], outcome["steps"]) for case, outcome in found.items()} == {
        "padding": (0, 12),
        "unreached": (0, 12),
        "nan": (5, 7),
    }


def test_a_checkpoint_resumes_on_all_ranks_and_on_another_number_of_them(tmp_path: Path) -> None:
    found: dict[str, Any] = launch(CHECKS, 2, tmp_path, "resume")
    assert set(found) == set(SETTINGS)
    for name, outcome in found.items():
        assert outcome["all ranks"], name
        assert outcome["one process"] == 0, name


def test_distributed_checkpoint_of_a_sharded_model(tmp_path: Path) -> None:
    found = launch(CHECKS, 2, tmp_path, "distributed_checkpoint")
    assert found == dict.fromkeys(SETTINGS, True)
