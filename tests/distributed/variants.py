"""Checks of DistributedDataParallel's options and of what is used beside it; each returns what rank 0 reports of it.

`tests.distributed.checks` runs them.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from hf_fngd import FNGD
from tests.distributed.harness import agree, alone, batch, flat, optimizer, run
from tests.nets import loss, net

RULES = ("muon", "block_muon")
OPTIONS = ("static_graph", "gradient_as_bucket_view", "find_unused_parameters")


def ddp_options() -> dict[str, Any]:
    """How far the ranks are from one process that accumulates, or None where they differ from each other."""
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {}
    for update in RULES:
        with alone():
            one, slow = _made(update)
            run(one, slow, list(range(world)), range(6))
        for option in OPTIONS:
            model, fngd = _made(update)
            run(DistributedDataParallel(model, **{option: True}), fngd, [rank], range(6))
            found[f"{update}, {option}"] = _distance(model, one)
    return found


def loss_scaler() -> dict[str, Any]:
    """The same with a loss scaler, and one rank's loss infinite in a step, which is skipped in all ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {}
    for update in RULES:
        with alone():
            one, slow = _made(update, torch.float32)
            _scaled(one, slow, list(range(world)))
        model, fngd = _made(update, torch.float32)
        _scaled(DistributedDataParallel(model), fngd, [rank])
        found[update] = _distance(model, one)
    return found


def _scaled(called: nn.Module, fngd: FNGD, ranks: list[int]) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for step in range(6):
        for rank in ranks:
            x, y = batch(step, rank)
            value = loss(called, x.float(), y) / len(ranks)
            scaler.scale(value * torch.inf if step == 3 and rank == dist.get_world_size() - 1 else value).backward()
        scaler.step(fngd)
        scaler.update()
        fngd.zero_grad()
    assert scaler.get_scale() == 2.0**10  # doubled once, halved once


def join_between() -> dict[str, bool]:
    """Whether all ranks agree where a Join context with uneven batches stands between steps that they share."""
    rank, found = dist.get_rank(), {}
    for update in RULES:
        model, fngd = _made(update)
        called = DistributedDataParallel(model)
        run(called, fngd, [rank], range(3))
        with Join([called, fngd]):
            run(called, fngd, [rank], range(3, 5 + rank))
        in_between = agree(flat(model))
        run(called, fngd, [rank], range(10, 13))
        found[update] = in_between and agree(flat(model)) and bool(flat(model).isfinite().all())
    return found


def _made(update: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, FNGD]:
    model = net(width=9, dtype=dtype)
    return model, optimizer(model, "clipped", update=update)


def _distance(model: nn.Module, one: nn.Module) -> float | None:
    return float((flat(model) - flat(one)).abs().max()) if agree(flat(model)) else None
