"""Checks that several processes run together; each returns what rank 0 reports of it.

Run by `tests.distributed.launch`: ``python -m tests.distributed.checks NAME... RESULT``.
"""

import copy
import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from hf_fngd import FNGD, FNGDCallback
from tests.distributed import matrices, variants
from tests.distributed.harness import (
    SETTINGS,
    STEPS,
    agree,
    alone,
    batch,
    engine_state,
    flat,
    make,
    optimizer,
    run,
    shard,
)
from tests.modes.harness import arguments
from tests.modes.nets import LINEAR
from tests.nets import data, loss, net
from tests.steps import digest, relative_error


def against_accumulation(prepare: Callable[..., tuple[nn.Module, FNGD]]) -> dict[str, Any]:
    """R ranks against one process that accumulates R micro-batches; and whether all ranks agree bit for bit."""
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {}
    for (name, settings), kind in product(SETTINGS.items(), ("Linear", "Conv1D")):
        model = net(width=9, layer_type=kind)
        called, fngd = prepare(model, settings)
        run(called, fngd, [rank])
        mine, state = flat(model), engine_state(fngd)
        same = agree(mine, state)
        with alone():
            reference, slow = make(kind, **settings)
            run(reference, slow, list(range(world)))
            accumulated = engine_state(slow)
        found[f"{name}, {kind}"] = {
            "active": _is_active(called),
            "agree": same,
            "error": float((flat(reference) - mine).abs().max()),
            "moved": float((flat(net(width=9, layer_type=kind)) - mine).abs().max()),
            "same state": digest(by_parts(accumulated)) == digest(by_parts(state)),
            "missed": len(fngd.coverage().missed),
        }
    return found


def by_parts(state: dict[str, Any]) -> dict[str, Any]:
    """A state, with the norms that "clipped" keeps in units of a sample's part in the gradient of all processes."""
    engine = state["engine"] | {"positions": state["positions"]}
    if "world" in engine["policy"]:
        policy = dict(engine["policy"])
        world = policy.pop("world")
        engine["policy"] = policy | {"means": policy["means"] / world}
    return engine


def ddp() -> dict[str, Any]:
    def prepare(model: nn.Module, settings: dict[str, Any]) -> tuple[nn.Module, FNGD]:
        fngd = optimizer(model, **settings)
        return DistributedDataParallel(model), fngd

    return against_accumulation(prepare)


def fsdp2() -> dict[str, Any]:
    """FNGD on a sharded model: torch's own order."""
    return against_accumulation(lambda model, settings: (shard(model), optimizer(model, **settings)))


def fsdp2_after() -> dict[str, Any]:
    """FNGD first, sharded afterwards, the parameters swapped in its groups: Accelerate's order."""

    def prepare(model: nn.Module, settings: dict[str, Any]) -> tuple[nn.Module, FNGD]:
        fngd = optimizer(model, **settings)
        names = {p: name for name, p in model.named_parameters()}
        shard(model)
        sharded = dict(model.named_parameters())
        for group in fngd.param_groups:
            group["params"] = [sharded[names[p]] for p in group["params"]]
        return model, fngd

    return against_accumulation(prepare)


def _is_active(called: nn.Module) -> bool:
    """Whether several processes share the work of a model."""
    if isinstance(called, DistributedDataParallel):
        return called.process_group.size() == dist.get_world_size() > 1
    return isinstance(called, FSDPModule) and all(isinstance(p, DTensor) for p in called.parameters())


def uniform_gradients() -> dict[str, Any]:
    """``p.grad`` of R ranks with N/R samples against one process with N; w = 1, so that they are equal."""
    rank, world = dist.get_rank(), dist.get_world_size()
    x, y = data(8 * world, 3, dtype=torch.float32)
    found = {}
    for kind in ("Linear", "Conv1D"):
        model = net(dtype=torch.float32, layer_type=kind)
        FNGD(model, sharing="uniform")
        called = DistributedDataParallel(model)
        loss(called, x[rank * 8 : rank * 8 + 8], y[rank * 8 : rank * 8 + 8]).backward()
        with alone():
            whole = net(dtype=torch.float32, layer_type=kind)
            FNGD(whole, sharing="uniform")
            loss(whole, x, y).backward()
        pairs = zip(model.parameters(), whole.parameters(), strict=True)
        found[kind] = max(relative_error(p.grad, q.grad) for p, q in pairs)
    return found


def collectives() -> dict[str, Any]:
    """FNGD's own collectives in each step: DistributedDataParallel's are not made from Python."""
    return {sharing: _collectives(sharing) for sharing in ("replay", "clipped", "uniform")}


def _collectives(sharing: str) -> list[int]:
    counts = [0]

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[-1] += 1
            return function(*args, **kwargs)

        return counted

    rank = dist.get_rank()
    model, fngd = make(sharing=sharing)
    called = DistributedDataParallel(model)
    names = ("all_gather", "all_reduce", "all_gather_object", "broadcast")
    with mock.patch.multiple(dist, **{name: counting(getattr(dist, name)) for name in names}):
        for step in range(STEPS):
            run(called, fngd, [rank], range(step, step + 1))
            fngd.state_dict()
            counts.append(0)
    return counts[:-1]


def uneven_ranks() -> dict[str, Any]:
    """The first rank accumulates one micro-batch more than the others, after a forward pass that comes to nothing."""
    rank = dist.get_rank()
    model, fngd = make(sharing="clipped")
    called = DistributedDataParallel(model)
    for step in range(4):
        fngd.zero_grad()
        if rank == 0:
            model(data(5, seed=step)[0])
            with called.no_sync():
                loss(called, *data(5, seed=step)).backward()
        loss(called, *data(5, seed=10 * step + rank)).backward()
        fngd.step()
    policy = fngd.preconditioner.policy.state_dict()
    return {"agree": agree(flat(model), policy), "parts": policy["parts"], "skipped": fngd.skipped}


def empty_ranks() -> dict[str, Any]:
    """A rank whose batch is all padding, one whose loss reaches no layer, and one whose loss is not finite."""
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {}
    for sharing, case in product(("replay", "clipped"), ("padding", "unreached", "nan")):
        model, fngd = make(sharing=sharing)
        called = DistributedDataParallel(model, find_unused_parameters=case == "unreached")
        for step in range(STEPS):
            odd = rank == world - 1 and step in (1, 5, 6, 7, 8)
            value = loss(called, *batch(step, rank))
            if odd and case == "padding":
                value = value * 0.0
            elif odd and case == "nan":
                value = value * torch.nan
            elif odd:
                value = sum(p.sum() for p in model.parameters()) * 0.0
            value.backward()
            fngd.step()
            fngd.zero_grad()
        found[f"{sharing}, {case}"] = {
            "agree": agree(flat(model), engine_state(fngd)),
            "finite": bool(flat(model).isfinite().all()),
            "skipped": fngd.skipped,
            "steps": getattr(fngd.preconditioner.policy, "steps", None),
        }
    return found


def resume() -> dict[str, Any]:
    """A checkpoint of rank 0 loaded by all ranks, and by one process that accumulates their micro-batches."""
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {}
    for name, settings in SETTINGS.items():
        model, fngd = make(**settings)
        run(DistributedDataParallel(model), fngd, [rank], range(8))
        state = copy.deepcopy({"model": model.state_dict(), "optimizer": fngd.state_dict()})
        saved: list[Any] = [state if rank == 0 else None]
        dist.broadcast_object_list(saved)
        run(DistributedDataParallel(model), fngd, [rank], range(8, STEPS))
        again, second = make(**settings)
        again.load_state_dict(saved[0]["model"])
        second.load_state_dict(copy.deepcopy(saved[0]["optimizer"]))
        run(DistributedDataParallel(again), second, [rank], range(8, STEPS))
        with alone():
            one, single = make(**settings)
            one.load_state_dict(saved[0]["model"])
            single.load_state_dict(copy.deepcopy(saved[0]["optimizer"]))
            run(one, single, list(range(world)), range(8, STEPS))
        found[name] = {
            "all ranks": bool(torch.equal(flat(again), flat(model))),
            "one process": float((flat(one) - flat(model)).abs().max()),
        }
    return found


def distributed_checkpoint() -> dict[str, Any]:
    """torch.distributed.checkpoint's state dict of a sharded model, into a fresh one, goes on as the first."""
    rank = dist.get_rank()
    found = {}
    for name, settings in SETTINGS.items():
        model = shard(net(width=9))
        fngd = optimizer(model, **settings)
        run(model, fngd, [rank], range(8))
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        state = copy.deepcopy(get_optimizer_state_dict(model, fngd))
        again = shard(net(width=9))
        second = optimizer(again, **settings)
        again.load_state_dict(weights)
        set_optimizer_state_dict(again, second, state)
        loaded = digest(engine_state(second)) == digest(engine_state(fngd))
        run(model, fngd, [rank], range(8, STEPS))
        run(again, second, [rank], range(8, STEPS))
        found[name] = loaded and bool(torch.equal(flat(again), flat(model)))
    return found


def stored_rows(fngd: FNGD) -> int:
    """Of how many micro-batches replay keeps the sample weights."""
    return len(fngd.preconditioner.state_dict()["policy"]["rows"])


def fsdp2_accumulation() -> dict[str, Any]:
    """Rows that replay keeps where gradients are reduced, and weights put away, with the last micro-batch only."""
    found = {}
    for reshard in (True, False):
        for dtype in (None, torch.bfloat16):
            model = net(width=9, dtype=torch.float32)
            options = {} if dtype is None else {"mp_policy": MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32)}
            fully_shard(model.fc1, reshard_after_forward=reshard, **options)
            fully_shard(model, reshard_after_forward=reshard, **options)
            fngd = FNGD(model, sharing="replay")
            for step in range(3):
                for part in range(2):
                    last = part == 1
                    model.set_requires_gradient_sync(last)
                    model.set_reshard_after_backward(last)
                    x, y = data(5, 3, seed=100 * step + 10 * part + dist.get_rank(), dtype=torch.float32)
                    nn.functional.cross_entropy(model(x).float(), y).backward()
                fngd.step()
                fngd.zero_grad()
            found[f"reshard_after_forward={reshard}, {dtype}"] = stored_rows(fngd)
    return found


def unfreezing() -> dict[str, Any]:
    """A layer that joins: under DDP only where the model is wrapped again, under FSDP2 by itself."""
    rank, world = dist.get_rank(), dist.get_world_size()
    found: dict[str, Any] = {}
    for name, wrap in (("ddp", DistributedDataParallel), ("fsdp2", shard)):
        outcomes = []
        for wrapped in ([rank], list(range(world))):
            with nullcontext() if wrapped == [rank] else alone():
                model = net(width=9)
                model.fc1.requires_grad_(False)
                called = wrap(model) if wrapped == [rank] else model
                fngd = optimizer(model, sharing="clipped")
                run(called, fngd, wrapped, range(3))
                model.fc1.requires_grad_(True)
                if called is not model:
                    try:
                        called(batch(0, rank)[0])
                    except RuntimeError as error:
                        found["refused"] = str(error)
                    called = wrap(model)
                run(called, fngd, wrapped, range(3, 6))
                outcomes.append(flat(model))
                if wrapped == [rank]:
                    found[f"{name}, agree"] = agree(outcomes[0])
        found[name] = float((outcomes[0] - outcomes[1]).abs().max())
        found[f"{name}, missed"] = list(fngd.coverage().missed)
    return found


def tensor_parallel() -> dict[str, Any]:
    """A layer whose weight is split over the processes: what FNGD says, built before or after the split."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}
    found = {}
    for order in ("before", "after"):
        model = net(width=8)
        if order == "before":
            _kept = FNGD(model)
        parallelize_module(model, mesh, plan)
        if order == "after":
            _kept = FNGD(model)
        try:
            loss(model, *data(6, 3))
        except RuntimeError as error:
            found[order] = str(error)
    return found


def trainer() -> dict[str, Any]:
    """Trainer's own DDP run; accumulates in one process what it spreads over several."""
    world = dist.get_world_size()
    model = LINEAR.make()
    fngd = FNGD(model, lr=1e-3, sharing="replay", damping=0.01)
    args = arguments(Path(tempfile.mkdtemp()), ddp_backend="gloo", gradient_accumulation_steps=2 // world)
    runner = Trainer(model, args, train_dataset=LINEAR.data(24), optimizers=(fngd, None), callbacks=[FNGDCallback()])
    runner.train()
    wrapped = isinstance(runner.model_wrapped, DistributedDataParallel)
    return {
        "active": wrapped and args.world_size == world,
        "agree": agree(flat(model), engine_state(fngd)),
        "parameters": flat(model)[::97].tolist(),
        "rows": stored_rows(fngd),
        "shared since": fngd.preconditioner.policy.shared_since,
    }


def main() -> None:
    *names, result = sys.argv[1:]
    dist.init_process_group("gloo")
    checks = vars(matrices) | vars(variants) | globals()
    found = {name: checks[name]() for name in names}
    if dist.get_rank() == 0:
        Path(result).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    # Past the interpreter's shutdown, in which gloo's threads now and then abort a process on a busy machine.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
