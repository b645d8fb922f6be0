"""Checks of processes with uneven numbers of batches; each returns what rank 0 reports of it.

Run by `tests.distributed.launch`: ``python -m tests.distributed.uneven RESULT``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from hf_fngd import FNGDPreconditioner
from tests.distributed.harness import SETTINGS, agree, alone, batch, flat, make, run
from tests.nets import loss, net

LEAST, EPOCHS = 3, 3
NAN = 4  # the step, of the first epoch, whose loss is NaN, when one process is left


def batches(rank: int) -> int:
    """Each process has two more than the one before."""
    return LEAST + 2 * rank


def numbers(epoch: int, rank: int) -> Iterator[int]:
    yield from range(10 * epoch, 10 * epoch + batches(rank))


def value(model: nn.Module, step: int, rank: int, bad: int | None = NAN) -> torch.Tensor:
    found = loss(model, *batch(step, rank))
    return found * torch.nan if step == bad else found


def train(called: nn.Module, optimizer: Any, steps: Iterable[int], passes: int = 1, bad: int | None = None) -> None:
    """This process's steps, each of one forward and backward pass or several; the loss of a bad one is NaN."""
    for step in steps:
        for _ in range(passes):
            value(called, step, dist.get_rank(), bad).backward()
        optimizer.step()
        optimizer.zero_grad()


def joined(name: str) -> dict[str, Any]:
    """Against one process that accumulates, in each step, the micro-batches of the processes that have one."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model, fngd = make(**SETTINGS[name])
    ddp = DistributedDataParallel(model)
    same = []
    for epoch in range(EPOCHS):
        with Join([ddp, fngd]):
            train(ddp, fngd, numbers(epoch, rank), bad=NAN)
            fngd.end_epoch()
        same.append(agree(flat(model), fngd.state_dict()))
    train(ddp, fngd, range(100, 102))  # beyond the context, with as many batches each
    same.append(agree(flat(model), fngd.state_dict()))
    with alone():
        slow, reference = make(**SETTINGS[name])
        for epoch in range(EPOCHS):
            for place in range(batches(world - 1)):
                for other in range(world):
                    if place < batches(other):
                        (value(slow, 10 * epoch + place, other) / world).backward()
                reference.step()
                reference.zero_grad()
            reference.end_epoch()
        run(slow, reference, list(range(world)), range(100, 102))
    policy = fngd.preconditioner.policy
    return {
        "agree": same,
        "error": float((flat(slow) - flat(model)).abs().max()),
        "moved": float((flat(net(width=9)) - flat(model)).abs().max()),
        "skipped": fngd.skipped,
        "shared since": getattr(policy, "shared_since", None),
    }


def followed() -> list[bool]:
    """The engine alone in front of SGD without momentum, which has no state."""
    rank = dist.get_rank()
    model = net(width=9)
    preconditioner = FNGDPreconditioner(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner.follow(optimizer)
    ddp = DistributedDataParallel(model)
    same = []
    for epoch in range(1, EPOCHS):
        with Join([ddp, preconditioner]):
            train(ddp, optimizer, numbers(epoch, rank))
        same.append(agree(flat(model), preconditioner.state_dict()))
    return same


def nothing() -> dict[str, bool]:
    """The first process has no batch at all in its first context, and trains on beyond it."""
    rank = dist.get_rank()
    found = {}
    for sharing in ("clipped", "never", "replay"):
        model, fngd = make(sharing=sharing)
        ddp = DistributedDataParallel(model)
        with Join([ddp, fngd]):
            train(ddp, fngd, range(1, 1 + 2 * rank))
        train(ddp, fngd, range(10, 12))
        found[sharing] = agree(flat(model), fngd.state_dict())
    return found


@contextmanager
def noted(found: dict[str, str], name: str) -> Iterator[None]:
    try:
        yield
        found[name] = "no error"
    except RuntimeError as error:
        found[name] = str(error)


def refused() -> dict[str, str]:
    """What all processes are told who enter the context in another way."""
    found: dict[str, str] = {}
    for sharing in ("clipped", "never", "uniform"):
        model, fngd = make(sharing=sharing)
        ddp = DistributedDataParallel(model)
        with noted(found, f"model.join(), {sharing}"), ddp.join():
            train(ddp, fngd, range(LEAST))
    for name, passes in (("FNGD first", 1), ("accumulation", 2)):
        model, fngd = make(sharing="clipped")
        ddp = DistributedDataParallel(model)
        with noted(found, name), Join([fngd, ddp] if name == "FNGD first" else [ddp, fngd]):
            train(ddp, fngd, range(LEAST), passes)
    return found


def hangs(result: Path) -> str:
    """One process makes a step more than the other, which waits until the error is there."""
    model = net(width=9)
    preconditioner = FNGDPreconditioner(model)
    found: dict[str, str] = {}
    for step in range(3):
        loss(model, *batch(step, 0)).backward()
        if step < 2:
            preconditioner.step()
        elif dist.get_rank() == 0:
            with noted(found, "hangs"):
                preconditioner.step()
        else:
            while not result.exists():
                time.sleep(0.1)
    return found.get("hangs", "")


def main() -> None:
    result = Path(sys.argv[1])
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    found: dict[str, Any] = {"joined": {name: joined(name) for name in SETTINGS}}
    found |= {"followed": followed(), "nothing": nothing(), "refused": refused()}
    # Beyond the timeout nothing more can be exchanged.
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    store = f"file://{result.with_name('store')}"
    dist.init_process_group("gloo", store, rank=rank, world_size=world, timeout=timedelta(seconds=3))
    found["hangs"] = hangs(result)
    if dist.get_rank() == 0:
        result.write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
