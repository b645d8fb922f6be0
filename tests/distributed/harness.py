"""What the checks of several processes share: nets, batches, the training loop, and how states are compared."""

from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_fngd import FNGD
from tests.nets import data, loss, net, settings_of
from tests.steps import digest

STEPS, EPOCH = 12, 6

# Every sharing policy, update rule and fallback at least once.
SETTINGS: dict[str, dict[str, Any]] = {
    "clipped, muon": {"sharing": "clipped"},
    "clipped, adam": {"sharing": "clipped", "update": "adam", "weight_decay": 0.1},
    "clipped, groups": {
        "sharing": "clipped",
        "param_groups": [{"params": ["fc2"], "lr": 3e-2, "update": "adam"}, {"params": ["norm"], "weight_decay": 0.1}],
    },
    "uniform, block_muon": {"sharing": "uniform", "update": "block_muon", "block_size": 2},
    "uniform, muon": {"sharing": "uniform", "fallback": "sgd"},
    "never, momentum": {"sharing": "never", "update": "momentum", "fallback": "sgd"},
    "replay, momentum": {"sharing": "replay", "update": "momentum"},
    "replay, muon": {"sharing": "replay", "coefficient_steps": None},
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
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found == [own] * len(found)


def engine_state(fngd: FNGD) -> Any:
    return fngd.state_dict()["param_groups"][0]["fngd"]
