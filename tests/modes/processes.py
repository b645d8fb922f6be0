"""Several processes that FNGD trains in."""

import functools
import tempfile
from pathlib import Path
from typing import Any

from tests.distributed.launch import launch
from tests.modes.nets import Kind
from tests.modes.registry import Run, mode

# Settings of tests.distributed.checks that stand for a policy.
SETTINGS = {"never": "never, momentum", "replay": "replay, momentum", "clipped": "clipped, adam"}


@functools.cache
def launched(check: str, world: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return launch("tests.distributed.checks", world, Path(folder), check)[check]


def processes(check: str, world: int) -> Run:
    """Parameters after 12 steps, against one process that accumulates the micro-batches of all."""

    def run(kind: Kind, sharing: str, folder: Path) -> float:
        outcome = launched(check, world)[f"{SETTINGS[sharing]}, {kind.name}"]
        assert outcome["active"]
        assert outcome["agree"], "the processes differ"
        return float(outcome["error"] / outcome["moved"])

    return run


for title, check, world in (
    ("DDP, 2 processes", "ddp", 2),
    ("DDP, 4 processes", "ddp", 4),
    ("FSDP2, 2 processes", "fsdp2", 2),
    ("FSDP2, 4 processes", "fsdp2", 4),
    ("FSDP2, sharded after FNGD was built, as Accelerate does", "fsdp2_after", 2),
):
    mode(title, tolerance=1e-12, tested_in="tests/distributed")(processes(check, world))
