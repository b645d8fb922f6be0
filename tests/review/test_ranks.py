"""Several processes, in unusual ways."""

from pathlib import Path

from tests.distributed.launch import launch
from tests.review.ranks import MICRO_BATCHES, STEPS


def test_fsdp2_keeps_every_micro_batch_of_a_step(tmp_path: Path) -> None:
    found = launch("tests.review.ranks", 2, tmp_path, "fsdp2_accumulation")["fsdp2_accumulation"]
    assert found == dict.fromkeys(found, 2 * STEPS * MICRO_BATCHES)
    assert len(found) == 4
