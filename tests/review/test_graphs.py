"""torch.compile where the model does not come as one graph, or its graph is used in unusual ways."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fngd import FNGD
from tests.nets import Net, data, net

# Raised by the compiler itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

Call = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], None]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def whole(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, backend="aot_eager")


def once(called: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    F.cross_entropy(called(x), y).backward()


def compare(
    plain: nn.Module, compiled: Callable[[nn.Module], Callable[[Tensor], Tensor]] = whole, call: Call = once
) -> None:
    """Train a model and its compiled copy, and expect the same parameters, with every layer preconditioned."""
    models = plain, copy.deepcopy(plain)
    for model, called in zip(models, (models[0], compiled(models[1])), strict=True):
        optimizer = FNGD(model, lr=1e-2, damping=0.01, sharing="replay", coefficient_steps=2, refresh=3)
        for step in range(6):
            call(called, *data(6, 4, seed=step))
            optimizer.step()
            optimizer.zero_grad()
        assert not optimizer.coverage().missed
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q)


class Broken(Net):
    """A print, say, between two layers."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.fc1(x)))
        torch._dynamo.graph_break()
        return self.fc2(hidden).flatten(1, -2).mean(1)


def test_a_graph_break_in_the_model() -> None:
    torch.manual_seed(0)
    compare(Broken().double())


def blocks(model: nn.Module) -> nn.Module:
    """As libraries compile the repeated blocks of a large model, and leave the rest."""
    model.fc1.compile(backend="aot_eager")
    return model


def test_only_a_part_of_the_model_is_compiled() -> None:
    compare(net(), blocks)


class Uncompiled(Net):
    """One layer runs where the compiler does not go."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.outside(x)))
        return self.fc2(hidden).flatten(1, -2).mean(1)

    @torch.compiler.disable
    def outside(self, x: Tensor) -> Tensor:
        return self.fc1(x)


def test_a_layer_outside_of_the_graphs() -> None:
    torch.manual_seed(0)
    compare(Uncompiled().double())


def twice(called: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    """Two losses of one forward pass, a backward pass for each."""
    output = called(x)
    F.cross_entropy(output, y).backward(retain_graph=True)
    output.square().mean().backward()


def test_a_retained_graph() -> None:
    compare(net(), call=twice)


def and_nothing(called: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    """The part of a batch that another process got is all of it."""
    once(called, x, y)
    called(x[:0]).sum().backward()


def test_an_empty_batch() -> None:
    compare(net(), call=and_nothing)
