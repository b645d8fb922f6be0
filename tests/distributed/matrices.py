"""Checks of what Muon does with sharded matrices: who orthogonalizes them, and what is sent. For `checks`."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from hf_fngd.layers.base import Matrices
from hf_fngd.updates import RULES, muon
from hf_fngd.updates.base import Update
from hf_fngd.updates.orthogonal import block_shape, orthogonalize_blocks
from tests.distributed.harness import (
    Collectives,
    agree,
    alone,
    batch,
    every,
    flat,
    optimizer,
    run,
    shard,
)
from tests.nets import loss, net

UPDATES: dict[str, dict[str, Any]] = {
    "muon": {"update": "muon"},
    "block_muon": {"update": "block_muon", "block_size": 2},
}


@contextmanager
def orthogonalized() -> Iterator[list[int]]:
    """In its context: how many matrices, or blocks, this rank orthogonalizes at a time."""
    counts: list[int] = []

    def counted(matrices: Tensor, size: int, steps: int) -> Tensor:
        counts.append(len(matrices) * block_shape(matrices.shape[1], size)[0])
        return orthogonalize_blocks(matrices, size, steps)

    with mock.patch.object(muon, "orthogonalize_blocks", counted):
        yield counts


def exchanged() -> dict[str, Any]:
    """A sharded model's step: its collectives, the bytes that all ranks send in each, what each orthogonalizes."""
    found = {}
    for update, settings in UPDATES.items():
        model = shard(net(width=12))
        fngd = optimizer(model, "uniform", **settings)
        loss(model, *batch(0, dist.get_rank())).backward()
        with orthogonalized() as counts, Collectives() as made:
            fngd.step()
        found[update] = [made.names, [sum(sent) for sent in zip(*every(made.sent), strict=True)], every(sum(counts))]
    return found


def exchanged_ddp() -> dict[str, Any]:
    """The same of a model in DistributedDataParallel, where it averages all gradients and where it may not."""
    found = {}

    def of_a_step(
        name: str, model: DistributedDataParallel, settings: dict[str, Any] = UPDATES["muon"], around: Any = None
    ) -> None:
        fngd = optimizer(model.module, "uniform", **settings)
        with around or nullcontext():
            loss(model, *batch(0, dist.get_rank())).backward()
        with orthogonalized() as counts, Collectives() as made:
            fngd.step()
        found[name] = [made.names, made.sent, every(sum(counts))]

    for update, settings in UPDATES.items():
        of_a_step(update, DistributedDataParallel(net(width=12)), settings)
    # A matrix of 40 rows, which many positions make a block of its own.
    of_a_step("many positions", DistributedDataParallel(net(width=40)), {"update": "block_muon"})
    model = DistributedDataParallel(net(width=12))
    of_a_step("no_sync", model, around=model.no_sync())
    model.register_comm_hook(None, allreduce_hook)
    of_a_step("hook", model)
    model = net(width=12)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["fc1.weight"])
    of_a_step("ignored", DistributedDataParallel(model))
    return found


def odd_passes() -> dict[str, bool]:
    """Whether the ranks agree where one has a pass that the others have not: whose loss reaches no layer, by itself."""
    rank, found = dist.get_rank(), {}
    for case in ("unreached", "by itself"):
        ddp = DistributedDataParallel(net(width=12), find_unused_parameters=case == "unreached")
        model, fngd = ddp.module, optimizer(ddp.module, "uniform", update="muon")
        for step in range(3):
            value = loss(ddp, *batch(step, rank))
            if case == "unreached" and rank == 1:
                value = 0 * torch.stack([p.sum() for p in model.parameters()]).sum()
            value.backward()
            if case == "by itself" and rank == 1:
                torch.autograd.grad(loss(model, *batch(step, rank)), model.get_submodule("fc1").weight)
            fngd.step()
            fngd.zero_grad()
        found[case] = agree(flat(model))
    return found


# Rows fewer than ranks, as many, not divisible, tall and wide, alike; stacked matrices, another dtype. Experts; filters
# of one and two dimensions, whole and in groups, as many of these as output channels.
MATRICES: list[tuple[tuple[int, ...], Matrices, torch.dtype]] = [
    *(
        ((rows, columns), (1, columns), torch.float64)
        for rows, columns in ((1, 4), (2, 7), (7, 5), (6, 6), (5, 30), (6, 6), (6, 6))
    ),
    *(((12, 4), (stacked, 4), torch.float64) for stacked in (3, 1)),
    ((4, 3), (1, 3), torch.float32),
    ((5, 4, 3), (5, 3), torch.float64),
    *(((6, 3, 5), (groups, 15), torch.float64) for groups in (1, 2, 6)),
    *(((8, 3, 3, 2), (groups, 18), torch.float64) for groups in (1, 4)),
]


def owned() -> dict[str, Any]:
    """Three steps of the rules on sharded matrices, against whole ones; how many matrices all ranks orthogonalize.

    Four ranks are two copies of two. One matrix more is split along its columns, and gathered.
    """
    world, found = dist.get_world_size(), {}
    mesh = init_device_mesh("cpu", (2, 2) if world == 4 else (world,))
    for update, limit in product(("muon", "block_muon"), (2**28, 400)):
        group = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "block_size": 2}
        matrices = [of for _, of, _ in MATRICES] + [(1, 6)]
        dims = [0] * len(MATRICES) + [1]
        torch.manual_seed(0)
        ones = [torch.randn(shape, dtype=dtype) for shape, _, dtype in [*MATRICES, ((5, 6), 1, torch.float64)]]
        buffers = [torch.zeros_like(p) for p in ones]

        def split(tensors: list[Tensor], dims: list[int] = dims) -> list[Tensor]:
            placements = ([*[Replicate()] * (mesh.ndim - 1), Shard(dim)] for dim in dims)
            return [distribute_tensor(x.clone(), mesh, of) for x, of in zip(tensors, placements, strict=True)]

        sharded, before = split(ones), [p.clone() for p in ones]
        state = [x.to_local() for x in split(buffers)]
        counts: list[int] = []
        with torch.no_grad(), mock.patch.object(muon, "_MUON_BYTES_ON_CPU", limit):
            for step in range(3):
                grads = [torch.randn_like(p) for p in ones]
                RULES[update].update(Update(ones, grads, [buffers], [step + 1] * len(ones), ones, matrices, group))
                own, parts = [p.to_local() for p in sharded], [g.to_local() for g in split(grads)]
                with orthogonalized() as counts, Collectives() as made:
                    RULES[update].update(Update(own, parts, [state], [step + 1] * len(own), sharded, matrices, group))
            errors = [float((p.full_tensor() - q).abs().max()) for p, q in zip(sharded, ones, strict=True)]
        single = errors.pop([p.dtype for p in ones].index(torch.float32))
        found[f"{update}, {limit}"] = {
            "error": max(errors),
            "error in float32": single,
            "moved": min(float((p - q).abs().max()) for p, q in zip(ones, before, strict=True)),
            "matrices": sum(every(sum(counts))),
            "collectives": made.names,
        }
    return found


def replicated() -> dict[str, Any]:
    """Three steps on matrices that all ranks hold and share out, against one that does all; who does how many."""
    found = {}
    for limit in (2**28, 400):
        group = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
        matrices = [of for _, of, _ in MATRICES]
        torch.manual_seed(0)
        ones = [torch.randn(shape, dtype=dtype) for shape, _, dtype in MATRICES]
        copies, before = [p.clone() for p in ones], [p.clone() for p in ones]
        states = [[torch.zeros_like(p) for p in ones] for _ in range(2)]
        counts: list[int] = []
        with torch.no_grad(), mock.patch.object(muon, "_MUON_BYTES_ON_CPU", limit):
            for step in range(3):
                grads, steps = [torch.randn_like(p) for p in ones], [step + 1] * len(ones)
                muon.muon_update(Update(ones, grads, [states[0]], steps, ones, matrices, group))
                with orthogonalized() as counts, Collectives() as made:
                    shared = Update(copies, grads, [states[1]], steps, copies, matrices, group, dist.group.WORLD)
                    muon.muon_update(shared)
        found[str(limit)] = {
            "error": max(float((p - q).abs().max()) for p, q in zip(copies, ones, strict=True)),
            "moved": min(float((p - q).abs().max()) for p, q in zip(ones, before, strict=True)),
            "agree": agree(copies),
            "matrices": every(sum(counts)),
            "collectives": made.names,
        }
    return found


class SmallExperts(nn.Module):
    """More experts than processes, and no multiple of these; torch's attention behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 5, 6) / 2)
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("ntd,edo->nto", x, self.up)
        return self.head(self.attention(y, y, y, need_weights=False)[0]).mean(1)


class SmallFilters(nn.Module):
    """Filters with fewer output channels than there are processes, of several groups, depthwise, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.whole, self.one = nn.Conv1d(3, 6, 1), nn.Conv1d(6, 9, 3, padding=1), nn.Conv1d(9, 1, 1)
        self.grouped, self.depthwise = nn.Conv1d(9, 6, 2, groups=3), nn.Conv1d(6, 6, 1, groups=6)
        self.up, self.out = nn.ConvTranspose1d(6, 8, 3, 2, groups=2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.whole(self.first(x)))
        y = torch.tanh(self.depthwise(self.grouped(y * self.one(y))))
        return self.out(torch.tanh(self.up(y)).mean(2))


def unweighed() -> dict[str, float]:
    """How far a sharded model whose experts and projections, or filters, Muon steps is from an accumulating one."""
    rank, world, found = dist.get_rank(), dist.get_world_size(), {}
    for update, kind, sharing in product(("muon", "block_muon"), (SmallExperts, SmallFilters), ("clipped", "never")):
        models = []
        for sharded in (True, False):
            torch.manual_seed(0)
            model = kind().double()
            with nullcontext() if sharded else alone():
                fngd = optimizer(fully_shard(model) if sharded else model, sharing, update=update)
                run(model, fngd, [rank] if sharded else list(range(world)), range(4))
            models.append(flat(model))
        found[f"{update}, {kind.__name__}, {sharing}"] = float((models[0] - models[1]).abs().max())
    return found
