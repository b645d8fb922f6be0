"""Runs as child processes, several side by side."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hf_fngd
from common.command_line import words
from comparison.plan import RECIPES, Comparison, Run
from comparison.results import Record, Results, read_outcome, read_progress, value

_LONGEST = 300  # characters of a message that are recorded


class Runner:
    """Executes runs that have not finished yet.

    An interrupted run starts again in the output folder that it had, with the same command line: it is up to the
    recipe to resume from the checkpoint there. Folders are those of the code as it is: what an earlier version of the
    package or the recipes left is neither resumed nor taken for a result.

    Args:
        comparison: What the runs belong to.
        results: Where they are recorded.
        output_dir: Parent of the runs' output folders.
        jobs: Processes side by side; the cores are divided among them.
        deadline: Value of `time.monotonic()` at which runs are cut off, and recorded up to their last checkpoints.
    """

    def __init__(
        self, comparison: Comparison, results: Results, output_dir: Path, jobs: int, deadline: float = math.inf
    ) -> None:
        self.comparison = comparison
        self.results = results
        self.output_dir = output_dir
        self.jobs = jobs
        self.deadline = deadline
        self.version = code_version()
        self._children: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False
        self._done = 0

    def execute(self, runs: Sequence[Run]) -> int:
        """Run what has not finished, the least advanced first; runs that failed before are tried again.

        Returns:
            The number of runs that failed.
        """
        todo = [run for run in runs if self.results.finished(run) is None]
        todo.sort(key=lambda run: (self.results.unfinished(run) or {"step": 0})["step"])
        self._done = len(runs) - len(todo)
        if self._done:
            print(f"{self._done} of {len(runs)} runs have finished before.", flush=True)
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                records = list(pool.map(lambda run: self._one(run, len(runs)), todo))
            except BaseException:
                self.stop()
                raise
        if waiting := records.count(None):
            print(f"Out of time: {waiting} of {len(runs)} runs were not begun; start again to go on.", flush=True)
        return sum(record is not None and record["status"] == "failed" for record in records)

    def stop(self) -> None:
        """End the children, and start no others."""
        with self._lock:
            self._stopped = True
            for child in self._children:
                child.terminate()

    def folder(self, run: Run) -> Path:
        """Return the output folder of a run."""
        return self.output_dir / f"{run.folder}-{self.version}"

    def _one(self, run: Run, total: int) -> Record | None:
        if time.monotonic() >= self.deadline:
            return None
        folder = self.folder(run)
        start = time.perf_counter()
        outcome = read_outcome(folder, self.comparison)
        if outcome["status"] == "finished" and self.results.failed(run) is None:
            outcome |= {"seconds": None, "resumed": True}  # it ended, but nobody was there to record it
        else:
            resumed = any(folder.glob("checkpoint-*"))
            code, message = self._child(run, folder)
            outcome = (read_progress if code is None else read_outcome)(folder, self.comparison)
            if code:
                outcome = {"status": "failed", "error": f"exit code {code}: {message}"}
            outcome |= {"seconds": round(time.perf_counter() - start, 1), "resumed": resumed}
        record = self.results.append(run, outcome | {"jobs": self.jobs})
        with self._lock:
            self._done += record["status"] != "unfinished"
            print(f"[{self._done}/{total}] {run}: {self._summary(run, record)}", flush=True)
        return record

    def _child(self, run: Run, folder: Path) -> tuple[int | None, str]:
        """Run the recipe; return its exit code, None if it was cut off, and the last line of its output."""
        folder.mkdir(parents=True, exist_ok=True)
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        command = [sys.executable, str(self.comparison.recipe), *words(run.options | {"output_dir": str(folder)})]
        log = folder / "log.txt"
        with log.open("ab") as output:
            with self._lock:
                if self._stopped:
                    raise InterruptedError("stopped")
                child = subprocess.Popen(
                    command,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env={"OMP_NUM_THREADS": str(threads), **os.environ},
                )
                self._children.add(child)
            left = None if self.deadline == math.inf else max(0.0, self.deadline - time.monotonic())
            code: int | None = None
            try:
                code = child.wait(left)
            except subprocess.TimeoutExpired:
                child.kill()  # a checkpoint that this cuts off is passed over
                child.wait()
            with self._lock:
                self._children.remove(child)
                if self._stopped:
                    raise InterruptedError("stopped")
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return code, lines[-1].strip()[:_LONGEST] if lines else "no output"

    def _summary(self, run: Run, record: Record) -> str:
        if record["status"] == "failed":
            return f"FAILED, {record['error']} (see {self.folder(run) / 'log.txt'})"
        score = value(record, self.comparison.metric)
        if record["status"] == "unfinished":
            so_far = "" if score is None else f", {self.comparison.metric} {score:.4g}"
            return f"out of time at step {record['step']} of {record['max_steps'] or '?'}{so_far}"
        time_taken = "" if record["seconds"] is None else f", {record['seconds']:.0f} s"
        return f"{self.comparison.metric} {'not a number' if score is None else f'{score:.4g}'}{time_taken}"


def code_version() -> str:
    """Return a hash of the package and of the recipes."""
    digest = hashlib.sha256()
    for root in (Path(hf_fngd.__file__).parent, RECIPES):
        for file in sorted(root.rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:8]
