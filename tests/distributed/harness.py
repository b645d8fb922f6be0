"""What the checks of several processes share: nets, batches, the training loop, and how states are compared."""

from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_fngd import FNGD
from tests.nets import data, loss, net, settings_of
from tests.steps import digest

STEPS, EPOCH = 12, 6

# Every sharing policy, update rule and fallback at least once.
SETTINGS: dict[str, dict[str, Any]] = {
    "clipped, muon": {"sharing": "clipped", "update": "muon"},
    "clipped, adam": {"sharing": "clipped", "update": "adam", "weight_decay": 0.1},
    "clipped, groups": {
        "sharing": "clipped",
        "param_groups": [{"params": ["fc2"], "lr": 3e-2, "update": "adam"}, {"params": ["norm"], "weight_decay": 0.1}],
    },
    "uniform, block_muon": {"sharing": "uniform", "update": "block_muon", "block_size": 2},
    "uniform, default": {"sharing": "uniform", "fallback": "sgd"},
    "never, momentum": {"sharing": "never", "update": "momentum", "fallback": "sgd"},
    "replay, momentum": {"sharing": "replay", "update": "momentum"},
    "replay, default": {"sharing": "replay", "coefficient_steps": None},
}


def make(layer_type: str = "Linear", **changes: Any) -> tuple[nn.Module, FNGD]:
    """A small net and FNGD on it, with four coefficient steps at most."""
    model = net(width=9, layer_type=layer_type)
    return model, optimizer(model, **changes)


def optimizer(model: nn.Module, sharing: str, **changes: Any) -> FNGD:
    return FNGD(model, **({"lr": 1e-2} | settings_of(sharing, damping=0.01, coefficient_steps=4) | changes))


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """One rank's samples; in every third step, the last of a short epoch, each rank has another number of them."""
    return data(5 if step % 3 != 2 else 2 + rank, 3, seed=100 * step + rank)


def run(model: nn.Module, fngd: FNGD, ranks: list[int], steps: range = range(STEPS)) -> None:
    """Train on the batches of some of the ranks, whose gradients are averaged in backward or accumulated."""
    for step in steps:
        for rank in ranks:
            last = rank == ranks[-1]
            synchronized = nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync()
            with synchronized:
                (loss(model, *batch(step, rank)) / len(ranks)).backward()
        fngd.step()
        fngd.zero_grad()
        if step == EPOCH - 1:
            fngd.end_epoch()


def alone() -> Any:
    """This process by itself: what it does is no part of the group's work."""
    return mock.patch.object(dist, "is_initialized", return_value=False)


def flat(model: nn.Module) -> Tensor:
    parts = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in parts])


def agree(*values: Any) -> bool:
    """Whether all ranks hold the same, bit for bit."""
    own = digest(list(values))
    return every(own) == [own] * dist.get_world_size()


def engine_state(fngd: FNGD) -> Any:
    groups = fngd.state_dict()["param_groups"]
    return groups[0]["fngd"] | {"positions": [group.get("positions") for group in groups]}


class Collectives(TorchDispatchMode):
    """In its context: the collectives by name, and the bytes that each exchange takes from here to other ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.sent: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace in ("c10d", "_c10d_functional") and not name.startswith(("wait", "_")):
            self.names.append(name)
            if name == "alltoall_base_":
                self.sent.append(
                    (args[1].numel() - args[4][dist.ProcessGroup.unbox(args[2]).rank()]) * args[1].itemsize
                )
            if name == "allgather_":
                self.sent.append(args[1][0].nbytes * (dist.get_world_size() - 1))
            if name == "broadcast_" and args[2] == dist.get_rank():
                self.sent.append(args[0][0].nbytes * (dist.get_world_size() - 1))
        return func(*args, **(kwargs or {}))


def shard(model: nn.Module) -> nn.Module:
    fully_shard(model.get_submodule("fc1"))  # a layer by itself, and the rest with the root
    return fully_shard(model)


def every(own: Any) -> list[Any]:
    """The values of all ranks."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found
