"""What a model returns may be anything: a weight that is used outside of its layer's forward shows all the same."""

import dataclasses
from collections import namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_fngd import FNGDPreconditioner
from hf_fngd.engine.reasons import USED_ELSEWHERE
from tests.nets import Elsewhere, data, loss, net, trained


class Plain:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.owner = self  # refers to itself


class Slotted:
    __slots__ = "logits"

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Inherited(Slotted):
    __slots__ = ("other",)


@dataclasses.dataclass(slots=True)
class Data:
    logits: Any


Named = namedtuple("Named", ["logits"])
OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "a tensor": lambda y: y,
    "an object": Plain,
    "an object with slots": Slotted,
    "one that inherits slots": Inherited,
    "a dataclass": Data,
    "a named tuple": Named,
    "a namespace": lambda y: SimpleNamespace(logits=y),
    "objects within each other": lambda y: {"all": [Plain(Data(SimpleNamespace(logits=y)))]},  # type: ignore[arg-type]
}


def logits(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = output["all"][0] if isinstance(output, dict) else output.logits
    return output


class Returns(Elsewhere):
    kind = ""

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = OUTPUTS[self.kind](super().forward(x))
        return output


class Unpacked(nn.Module):
    """Called by `loss`, which wants a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return logits(self.model(x))


@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_weight_that_is_used_elsewhere_is_plain_whatever_the_model_returns(kind: str) -> None:
    model, (x, y) = net(cls=Returns), data(7, 3)
    model.kind = kind
    whole = Unpacked(model)
    expected = torch.autograd.grad(loss(whole, x, y), trained(model.fc2))
    preconditioner = FNGDPreconditioner(model)
    loss(whole, x, y).backward()
    preconditioner.step()
    assert preconditioner.coverage().missed == dict.fromkeys(("fc2.weight", "fc2.bias"), USED_ELSEWHERE)
    torch.testing.assert_close([p.grad for p in trained(model.fc2)], [*expected], rtol=1e-12, atol=1e-14)
