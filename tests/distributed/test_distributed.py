"""Several processes against one that accumulates their micro-batches, and against each other.

One launch for each number of processes: most of its time goes into their imports.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import SETTINGS
from tests.distributed.launch import launch

CHECKS = "tests.distributed.checks"
# A step's collectives: of the gradients' norms, to the owners of matrices and back.
NORM, EXCHANGE = ["allreduce_"], ["alltoall_base_"] * 2
# In `checks.owned`: matrices that have an owner, and those that the first dimension counts.
MATRICES, EXPERTS = 20, 11


@pytest.mark.timeout(600)
def test_two_processes(subtests: pytest.Subtests, tmp_path: Path) -> None:
    names = ["ddp", "fsdp2", "fsdp2_after", "uniform_gradients", "collectives", "empty_ranks", "uneven_ranks", "resume"]
    names += [
        "exchanged",
        "exchanged_ddp",
        "odd_passes",
        "owned",
        "replicated",
        "unweighed",
        "distributed_checkpoint",
        "fsdp2_accumulation",
        "unfreezing",
        "tensor_parallel",
        "ddp_options",
        "loss_scaler",
        "join_between",
        "trainer",
    ]
    found = launch(CHECKS, 2, tmp_path, *names)
    with subtests.test("ddp"):
        equal_to_accumulation(found["ddp"], tolerance=0.0)
        assert all(outcome["same state"] for outcome in found["ddp"].values())
    for mode in ("fsdp2", "fsdp2_after"):
        with subtests.test(mode):
            equal_to_accumulation(found[mode], tolerance=1e-12)
    with subtests.test("uniform weights give the gradient of the whole batch"):
        assert max(found["uniform_gradients"].values()) < 1e-6
    with subtests.test("one collective in a coefficient step, none in a shared one"):
        assert found["collectives"] == {  # one more in the first step, of how many positions the layers saw
            "replay": [2] + [1] * 3 + [0] * 8,
            "clipped": [2] + [1] * 11,  # of the mean norms
            "uniform": [1] + [0] * 11,
        }
    with subtests.test("two exchanges for all matrices, none for blocks that a process holds whole"):
        away = 8 * (12 * 5 + 4 * 12) // 2  # bytes: float64, and half of each matrix is the owner's own part
        assert found["exchanged"] == {"muon": [NORM + EXCHANGE, [away] * 2, [1, 1]], "block_muon": [NORM, [], [4, 4]]}
    with subtests.test("exchanges under DDP where it averages all gradients"):
        exchanged_ddp(found["exchanged_ddp"], sent=8 * 12 * 5, orthogonalized=[1, 1])
    with subtests.test("a rank's own passes neither hang nor part it from the others"):
        assert found["odd_passes"] == {"unreached": True, "by itself": True}
    replicated(subtests, found["replicated"])
    owned(subtests, found["owned"], orthogonalized=MATRICES + EXPERTS + 2)
    with subtests.test("experts, torch's attention and filters"):
        assert max(found["unweighed"].values()) < 1e-12
    with subtests.test("a rank without a gradient neither hangs nor parts from the others"):
        cases = found["empty_ranks"]
        assert all(outcome["agree"] and outcome["finite"] for outcome in cases.values())
        counts = {case: (outcome["skipped"], outcome["steps"]) for case, outcome in cases.items()}
        ends = {"padding": (0, 12), "unreached": (0, 12), "nan": (5, 7)}
        expected = {f"replay, {case}": end for case, end in ends.items()}
        assert counts == expected | {f"clipped, {case}": (skipped, None) for case, (skipped, _) in ends.items()}
    with subtests.test("ranks that accumulate differently keep the same norms"):
        assert found["uneven_ranks"] == {"agree": True, "parts": 3, "skipped": 0}
    with subtests.test("a checkpoint resumes on all ranks, and on one process that accumulates"):
        assert found["resume"] == {name: {"all ranks": True, "one process": 0.0} for name in SETTINGS}
    with subtests.test("torch.distributed.checkpoint of a sharded model"):
        assert found["distributed_checkpoint"] == dict.fromkeys(SETTINGS, True)
    with subtests.test("FSDP2 keeps every micro-batch of a step"):
        assert list(found["fsdp2_accumulation"].values()) == [2 * 3 * 2] * 4  # processes, steps, micro-batches
    with subtests.test("layers join"):
        outcome = found["unfreezing"]
        assert "unfrozen after DistributedDataParallel" in outcome.pop("refused")
        assert outcome.pop("ddp, agree") is outcome.pop("fsdp2, agree") is True
        assert outcome.pop("ddp, missed") == outcome.pop("fsdp2, missed") == []
        assert max(outcome.values()) < 1e-12
    with subtests.test("options of DistributedDataParallel, and a loss scaler"):
        assert set(found["ddp_options"].values()) == set(found["loss_scaler"].values()) == {0.0}
    with subtests.test("uneven batches between steps that are shared"):
        assert found["join_between"] == {"muon": True, "block_muon": True}
    with subtests.test("tensor parallelism is refused"):
        assert set(found["tensor_parallel"]) == {"before", "after"}
        assert all("tensor parallelism" in message for message in found["tensor_parallel"].values())
    with subtests.test("Trainer"):
        (tmp_path / "one").mkdir()
        several, one = found["trainer"], launch(CHECKS, 1, tmp_path / "one", "trainer")["trainer"]
        assert several["active"]
        assert several["agree"]
        assert (several["rows"], several["shared since"]) == (one["rows"], one["shared since"])
        assert several["parameters"] == pytest.approx(one["parameters"], rel=1e-3, abs=1e-5)


@pytest.mark.timeout(600)
def test_three_processes(subtests: pytest.Subtests, tmp_path: Path) -> None:
    found = launch(CHECKS, 3, tmp_path, "exchanged", "exchanged_ddp", "owned", "replicated")
    with subtests.test("parts of two, two and no rows"):
        narrow = 8 * 2 * 12
        assert found["exchanged"] == {
            "muon": [NORM + EXCHANGE, [8 * 8 * 5 + narrow] * 2, [1, 1, 0]],
            "block_muon": [NORM + EXCHANGE, [narrow] * 2, [4, 2, 2]],
        }
    with subtests.test("exchanges under DDP, and a process without a matrix"):
        exchanged_ddp(found["exchanged_ddp"], sent=2 * 8 * 12 * 5, orthogonalized=[1, 1, 0])
    replicated(subtests, found["replicated"])
    owned(subtests, found["owned"], orthogonalized=MATRICES + EXPERTS + 3)


@pytest.mark.timeout(600)
def test_four_processes(subtests: pytest.Subtests, tmp_path: Path) -> None:
    found = launch(CHECKS, 4, tmp_path, "ddp", "fsdp2", "uniform_gradients", "empty_ranks", "owned")
    owned(subtests, found["owned"], orthogonalized=2 * (MATRICES + EXPERTS) + 4)
    for mode in ("ddp", "fsdp2"):
        with subtests.test(mode):
            equal_to_accumulation(found[mode], tolerance=1e-12)
    with subtests.test("uniform weights give the gradient of the whole batch"):
        assert max(found["uniform_gradients"].values()) < 1e-6
    with subtests.test("a rank without a gradient"):
        assert all(outcome["agree"] and outcome["finite"] for outcome in found["empty_ranks"].values())


def equal_to_accumulation(found: dict[str, Any], tolerance: float) -> None:
    assert len(found) == 2 * len(SETTINGS)
    for name, outcome in found.items():
        assert outcome["active"], name
        assert outcome["agree"], f"{name}: parameters, store, rho or phase differ between the ranks"
        assert outcome["error"] <= tolerance, name
        assert outcome["moved"] > 0.05, name
        assert outcome["missed"] == 0, name


def exchanged_ddp(found: dict[str, Any], sent: int, orthogonalized: list[int]) -> None:
    """One process orthogonalizes each matrix, and sends it to all others; the first has the larger one."""
    processes = len(orthogonalized)
    others = processes - 1
    assert found.pop("muon") == [["broadcast_"] * 2, [sent], orthogonalized]
    assert found.pop("block_muon") == [[], [], [8] * processes]
    # The first exchange is that of the positions, and of which of the two layers have a gradient; all orthogonalize the
    # smaller matrix.
    sizes = [8 * 3 * others, 8 * 40 * 5 * others]
    assert found.pop("many positions") == [["allgather_", "broadcast_"], sizes, [2] + [1] * others]
    assert set(found) == {"no_sync", "hook", "ignored"}
    assert all(outcome == [[], [], [2] * processes] for outcome in found.values())


def replicated(subtests: pytest.Subtests, found: dict[str, Any]) -> None:
    """Matrices that are shared out move as those that are not."""
    for case, outcome in found.items():
        with subtests.test("replicas", case=case):
            assert outcome["moved"] > 0.05
            assert outcome["error"] < 1e-12  # in float32 as well: the same operations
            assert outcome["agree"]
            assert sum(outcome["matrices"]) == MATRICES + EXPERTS
    in_one, in_portions = (outcome["collectives"] for outcome in found.values())
    processes = len(outcome["matrices"])
    assert in_one == ["broadcast_"] * (processes + 1)  # of each process in float64, of one in float32
    assert len(in_portions) > len(in_one)


def owned(subtests: pytest.Subtests, found: dict[str, Any], orthogonalized: int) -> None:
    """Sharded matrices move as whole ones, and copies of one rank alone orthogonalize each."""
    for case, outcome in found.items():
        with subtests.test("owners", case=case):
            assert outcome["moved"] > 0.05
            assert outcome["error"] < 1e-12
            assert outcome["error in float32"] < 1e-6
    for case in ("muon, 268435456", "muon, 400"):
        assert found[case]["matrices"] == orthogonalized
    whole, in_portions = (found[case]["collectives"] for case in ("muon, 268435456", "muon, 400"))
    assert whole == ["all_gather_into_tensor", *EXCHANGE, *EXCHANGE]  # float64 and float32
    assert len(in_portions) > len(whole)
