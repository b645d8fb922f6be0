"""Run functions of this package in several processes, as torchrun would, over gloo."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def launch(module: str, world: int, folder: Path, *arguments: str, timeout: int = 500) -> dict[str, Any]:
    """Run ``python -m module *arguments`` as ranks 0 to world - 1; what rank 0 wrote to its last argument's file.

    Raises:
        AssertionError: a rank failed; the message holds what it printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    result = folder / "result.json"
    processes = []
    for rank in range(world):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "recipes")]),
        }
        command = [sys.executable, "-m", module, *arguments, str(result)]
        with (folder / f"rank{rank}.log").open("w") as log:
            processes.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join((folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(world))
    assert codes == [0] * world, logs
    found: dict[str, Any] = json.loads(result.read_text())
    return found
