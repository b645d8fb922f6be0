"""Small networks, their data, and settings that go with a policy, shared by several tests."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from hf_fngd.layers.base import layer_type_names
from hf_fngd.updates import RULES
from hf_fngd.weights.base import policy_class, policy_names

FEATURES, CLASSES = 5, 4
LAYER_NAMES = ("fc1", "fc2")

# Layer type and what becomes of its bias; a Conv1D always has one.
LAYERS = [("Linear", "trained"), ("Linear", "frozen"), ("Linear", "none"), ("Conv1D", "trained"), ("Conv1D", "frozen")]


def layer(layer_type: str, bias: str, i: int, o: int) -> nn.Module:
    if layer_type == "Linear":
        made: nn.Module = nn.Linear(i, o, bias=bias != "none")
    else:
        made = Conv1D(o, i)
        nn.init.normal_(made.weight, std=i**-0.5)
        nn.init.normal_(made.bias)
    if bias == "frozen":
        made.bias.requires_grad_(False)
    return made


class Net(nn.Module):
    """Two layers around a norm; the outputs are averaged over whatever lies between batch and classes."""

    def __init__(self, layer_type: str = "Linear", bias: str = "trained", width: int = 7) -> None:
        super().__init__()
        self.fc1 = layer(layer_type, bias, FEATURES, width)
        self.norm = nn.LayerNorm(width)
        self.fc2 = layer(layer_type, bias, width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.fc1(x)))

    def head(self, hidden: Tensor) -> Tensor:
        y = self.fc2(hidden)
        return y if y.dim() == 2 else y.flatten(1, -2).mean(1)


class Checkpointed(Net):
    """Recomputes its layers in the backward pass."""

    reentrant = False

    def hidden(self, x: Tensor) -> Tensor:
        return checkpoint(super().hidden, x, use_reentrant=self.reentrant)

    def head(self, hidden: Tensor) -> Tensor:
        return checkpoint(super().head, hidden, use_reentrant=self.reentrant)


class Twice(Net):
    """Calls a layer twice."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.again = nn.Linear(7, 7)

    def hidden(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.again(super().hidden(x))))


class Elsewhere(Net):
    """Uses a layer's weight outside of its forward as well."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.fc2.weight.sum(1)


def net(seed: int = 0, dtype: torch.dtype = torch.float64, cls: type[Net] = Net, **kwargs: Any) -> Net:
    torch.manual_seed(seed)
    return cls(**kwargs).to(dtype)


def data(samples: int, *between: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs ``[samples, *between, FEATURES]`` and class labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, *between, FEATURES, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(CLASSES, (samples,), generator=generator)


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean of the samples' losses."""
    return F.cross_entropy(model(x), y)


class WithLoss(nn.Module):
    """A `Net` that returns its loss, as a Trainer's model does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net(dtype=torch.float32)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": loss(self.net, x, labels)}


def samples(count: int) -> list[dict[str, Tensor]]:
    """What a Trainer trains it on."""
    return [{"x": x, "labels": y} for x, y in zip(*data(count, dtype=torch.float32), strict=True)]


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


EVERY_TYPE = list(layer_type_names())
"""Of layers, those that are weighed by default and the others."""


def settings_of(sharing: str, **values: Any) -> dict[str, Any]:
    """Arguments of FNGD: the policy's name, every layer type, and of ``values`` those that the policy reads."""
    read = {name: value for name, value in values.items() if name in policy_class(sharing).reads}
    return {"sharing": sharing, "layer_types": EVERY_TYPE} | read


UPDATES = sorted(RULES, key=lambda name: name == "momentum")
UPDATES_OF = {
    name: [update for update in UPDATES if update != "momentum" or policy_class(name).solves] for name in policy_names()
}
"""The update rules that go with each policy."""
