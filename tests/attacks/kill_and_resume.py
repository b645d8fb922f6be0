"""Kill training runs at random points by SIGKILL, resume them, and compare with runs that nobody killed.

    python -m tests.attacks.kill_and_resume --count 100 --seed 0 --output kills.jsonl

Each run draws its settings and one or two deaths. Final parameters, optimizer state and logs have to be equal bit
for bit. The output gets one JSON line a run, and a second start goes on where the first one ended.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # the processes are forked from this one, which may have no threads
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from hf_fngd import last_complete_checkpoint
from hf_fngd.updates import FALLBACK_RULES
from hf_fngd.weights.base import policy_names
from tests.attacks.dying_run import SAVED_FILES, SPOILS, Death, train
from tests.nets import UPDATES_OF, settings_of

KINDS = (*SAVED_FILES, "first-epoch", "switch", "later", "backward", "saved", "deleting", "time")
TIME_LIMIT = 120.0


def draw_settings(seed: int, run: int) -> dict[str, Any]:
    """The settings of one run; whoever kills it, and where, is drawn later from what happens in it."""
    of = random.Random(f"{seed}-{run}-settings")
    accumulation, batch = of.randint(1, 3), of.randint(2, 5)
    kind = KINDS[run % len(KINDS)]
    return {
        "kind": kind,
        "model": of.choice(["bert", "gpt2"]),
        "dropout": of.choice([0.1, 0.3]),
        "samples": batch * accumulation * of.randint(3, 5) + of.randint(0, batch - 1),
        "epochs": of.randint(2, 3),
        "batch": batch,
        "accumulation": accumulation,
        "save_steps": of.randint(1, 4),
        "save_total_limit": of.randint(1, 2) if kind == "deleting" else of.choice([None, None, 1, 2]),
        "scheduler": of.choice(["linear", "cosine"]),
        "max_grad_norm": of.choice([0.0, 1.0]),
        "callback": of.random() < 0.5,
        "trainer_seed": of.randint(0, 10**6),
        "fngd": draw_arguments(of, kind),
    }


def draw_arguments(of: random.Random, kind: str) -> dict[str, Any]:
    """The optimizer's; at a switch there has to be one."""
    sharing = of.choice(("replay",) if kind in ("switch", "later") else policy_names())
    return {
        "lr": 10 ** of.uniform(-3, -1.5),
        "momentum": of.choice([0.0, 0.9]),
        "weight_decay": of.choice([0.0, 0.1]),
        "update": of.choice(UPDATES_OF[sharing]),
        "fallback": of.choice(list(FALLBACK_RULES)),
        **settings_of(sharing, damping=10 ** of.uniform(-3, 0), coefficient_steps=of.choice([1, 2, 4, None])),
    }


def draw_death(of: random.Random, kind: str, events: list[tuple[str, int, int]], done: int) -> Death:
    """A death of a kind among the events after step ``done``; of any kind that there is, if not of this one."""
    left = [event for event in events if event[1] > done]
    if kind != "time" and not any(event[0] == kind for event in left):
        kind = of.choice(sorted({event[0] for event in left}) or ["time"])
    share = of.random()
    if kind == "time":
        return Death("time", share=share)
    return Death(*of.choice([event for event in left if event[0] == kind]), share=share)


def in_child(settings: dict[str, Any], folder: Path, resume: str | None, death: Death | None, after: float) -> bool:
    """Train in a process of its own, killed ``after`` seconds; whether it lived to write ``result.pt``.

    Raises:
        RuntimeError: it failed by itself; the message ends in its output.
    """
    log, result = folder / "log.txt", folder / "result.pt"
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(BaseException):
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            try:
                save = torch.save
                value = train(settings, folder / "run", resume, death)
                save(value, folder / "unfinished.pt")
                os.replace(folder / "unfinished.pt", result)
                status = 0
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
        os._exit(status)
    deadline = time.monotonic() + after
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            break
        time.sleep(0.002)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and (death is not None):
        return False
    if status != 0 or not result.exists():
        raise RuntimeError(f"the run ended with status {status}:\n{log.read_text()[-4000:]}")
    return True


def differences(found: Any, expected: Any, where: str = "") -> Iterator[str]:
    """The places at which two nested values are not the same bit for bit."""
    if isinstance(found, torch.Tensor) and isinstance(expected, torch.Tensor):
        if (found.dtype, found.shape) != (expected.dtype, expected.shape):
            yield f"{where}: {found.dtype} {tuple(found.shape)}, not {expected.dtype} {tuple(expected.shape)}"
        elif found.contiguous().numpy().tobytes() != expected.contiguous().numpy().tobytes():
            yield f"{where}: largest difference {float((found - expected).abs().max()):.3g}"
    elif isinstance(found, dict) and isinstance(expected, dict):
        if found.keys() != expected.keys():
            yield f"{where}: only in one: {sorted(map(str, found.keys() ^ expected.keys()))}"
        for key in (key for key in expected if key in found):
            yield from differences(found[key], expected[key], f"{where}.{key}")
    elif isinstance(found, list | tuple) and isinstance(expected, list | tuple):
        if len(found) != len(expected):
            yield f"{where}: {len(found)} items, not {len(expected)}"
        for place, pair in enumerate(zip(found, expected, strict=False)):
            yield from differences(*pair, f"{where}[{place}]")
    elif type(found) is not type(expected) or (found != expected and not (found != found and expected != expected)):
        yield f"{where}: {found!r}, not {expected!r}"


def compared(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name != "events"}


def attack(seed: int, run: int, root: Path, spoils: Sequence[str | None] = (None,)) -> list[dict[str, Any]]:
    """Run without a death, then with one or two of them; a line for the output for each way to damage what is left."""
    settings = draw_settings(seed, run)
    of = random.Random(f"{seed}-{run}-deaths")
    for name in ("whole", "killed"):
        (root / name).mkdir(parents=True)
    start = time.monotonic()
    in_child(settings, root / "whole", None, None, TIME_LIMIT)
    seconds = time.monotonic() - start
    whole = torch.load(root / "whole" / "result.pt", weights_only=True)
    folder, resume, deaths, alive = root / "killed", None, [], False
    kinds = [settings["kind"], *([of.choice(KINDS)] if of.random() < 0.4 else [])]
    for kind in kinds:
        done = 0 if resume is None else int(resume.rpartition("-")[2])
        death = draw_death(of, kind, whole["events"], done)
        alive = in_child(settings, folder, resume, death, death.share * seconds if death.kind == "time" else TIME_LIMIT)
        if alive:
            break
        resume = last_complete_checkpoint(folder / "run") if (folder / "run").exists() else None
        newest = max((int(path.name[11:]) for path in (folder / "run").glob("checkpoint-*")), default=None)
        found_step = None if resume is None else int(resume.rpartition("-")[2])
        deaths.append({**vars(death), "resumed_from": found_step, "passed_over": newest != found_step})
    steps, lines = max(step for _, step, _ in whole["events"]), []
    for spoil in spoils:
        ending = Path(shutil.copytree(folder, root / f"killed-{spoil}"))
        if resume is not None:
            resume = str(ending / "run" / Path(resume).name)
            if spoil is not None:
                SPOILS[spoil](Path(resume))
        if not alive:
            in_child(settings, ending, resume, None, TIME_LIMIT)
        killed = torch.load(ending / "result.pt", weights_only=True)
        found = list(differences(compared(killed), compared(whole)))
        line = {"seed": seed, "run": run, "spoil": spoil, **settings, "steps": steps, "deaths": deaths}
        lines.append({**line, "matched": not found, "differences": found[:8]})
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 where every run matched."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="number of runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON lines; runs that are in it already are not repeated")
    parser.add_argument("--runs", type=int, nargs="*", help="only these runs, by number")
    parser.add_argument(
        "--spoil", choices=SPOILS, nargs="*", help="damage the last checkpoint before it is resumed from"
    )
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    lines = []
    if args.output is not None and args.output.exists():
        lines = [json.loads(line) for line in args.output.read_text().splitlines()]
        lines = [line for line in lines if line["seed"] == args.seed]
    done = {(line["run"], line["spoil"]) for line in lines}
    runs = range(args.count) if args.runs is None else args.runs
    for run in runs:
        spoils = [spoil for spoil in args.spoil or [None] if (run, spoil) not in done]
        if not spoils:
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                made = attack(args.seed, run, Path(folder), spoils)
            except RuntimeError as error:
                failed = {"seed": args.seed, "run": run, "deaths": [], "matched": False, "differences": [str(error)]}
                made = [{**failed, "spoil": spoil} for spoil in spoils]
        lines += made
        for line in made:
            if args.output is not None:
                with args.output.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            if not line["matched"]:
                print(f"run {run}: {json.dumps(line, indent=1)}", flush=True)
    matched = sum(line["matched"] for line in lines)
    deaths = [death for line in lines for death in line["deaths"]]
    for kind in KINDS:
        of_kind = [death for death in deaths if death["kind"] == kind]
        resumed, past = (sum(map(bool, (death[key] for death in of_kind))) for key in ("resumed_from", "passed_over"))
        print(f"{kind:20} {len(of_kind):4} deaths, {resumed:3} resumed from a checkpoint, {past:3} past a cut off one")
    twice = sum(len(line["deaths"]) == 2 for line in lines)
    untouched = sum(not line["deaths"] for line in lines)
    print(f"{len(lines)} runs, {len(deaths)} deaths ({twice} runs died twice, {untouched} never): {matched} matched")
    return 0 if matched == len(lines) else 1


if __name__ == "__main__":
    logging.getLogger("hf_fngd").setLevel(logging.ERROR)  # it names each checkpoint that it passes over
    sys.exit(main())
