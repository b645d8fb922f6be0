"""torch.compile: one graph, no break, no recompilation from step to step, and the eager run's numbers."""

import copy
from collections.abc import Callable
from enum import StrEnum
from types import MethodType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from hf_fngd import FNGD, FNGDPreconditioner
from hf_fngd.weights.base import policy_names
from tests.nets import LAYERS, Checkpointed, Elsewhere, Net, Twice, data, net, settings_of
from tests.steps import assert_equal

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    # Raised and ignored by the compiler itself.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

Called = Callable[[Tensor], Tensor]


# Models ----------------------------------------------------------------------------------------------------


class InPlace(Net):
    """Changes the outputs of its layers in place."""

    def hidden(self, x: Tensor) -> Tensor:
        return torch.relu_(self.norm(self.fc1(x).mul_(2)))

    def head(self, hidden: Tensor) -> Tensor:
        return self.fc2(hidden).mul_(2).mean(1)


class Broken(Net):
    """A print, say, between two layers."""

    def hidden(self, x: Tensor) -> Tensor:
        y = super().hidden(x)
        torch._dynamo.graph_break()
        return y


class Uncompiled(Net):
    """One layer runs where the compiler does not go."""

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(torch.compiler.disable(self.fc1)(x)))


class Changing(Net):
    """Changes its input in place, and a frozen parameter with each training forward pass, as a momentum encoder."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mean = nn.Parameter(torch.zeros(7), requires_grad=False)

    def hidden(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.5).add_(self.fc1.weight.mean(1), alpha=0.5)
        return super().hidden(x.mul_(2)) - self.mean


class Noting(Net):
    """Sets attributes of its own in a forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        self.size, self.seen = len(x), x
        return super().forward(x)


# Steps -----------------------------------------------------------------------------------------------------


def once(called: Called, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(called(x), y).backward()


def in_parts(called: Called, x: Tensor, y: Tensor) -> None:
    for part in range(3):
        once(called, x + part, y)


def in_bfloat16(called: Called, x: Tensor, y: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        F.cross_entropy(called(x.float()).float(), y).backward()


def two_at_once(called: Called, x: Tensor, y: Tensor) -> None:
    """Two forward passes before their backward passes."""
    first, second = F.cross_entropy(called(x), y), F.cross_entropy(called(x + 1), y)
    second.backward()
    first.backward()


def retained(called: Called, x: Tensor, y: Tensor) -> None:
    """Two losses of one forward pass, a backward pass for each."""
    output = called(x)
    F.cross_entropy(output, y).backward(retain_graph=True)
    output.square().mean().backward()


def and_nothing(called: Called, x: Tensor, y: Tensor) -> None:
    """The part of a batch that another process got is all of it."""
    once(called, x, y)
    called(x[:0]).sum().backward()


def one_layer(model: nn.Module) -> Called:
    """As libraries compile the repeated blocks of a large model, and leave the rest."""
    model.fc1.compile(backend="aot_eager")
    return model


def replaced(model: nn.Module) -> Called:
    """As TRL's trainers, which put a forward of their own on the model, behind the optimizer."""
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def called(x: Tensor) -> Tensor:
        if "forward" not in vars(model):
            model.forward = MethodType(lambda self, x: self.head(self.hidden(x)), model)
        return compiled(x)

    return called


class Case(NamedTuple):
    cls: type[Net] = Net
    step: Callable[[Called, Tensor, Tensor], None] = once
    graphs: int | None = 1  # None: not one graph
    sizes: tuple[int, ...] = (6,)
    compiled: Callable[[nn.Module], Called] | None = None
    dtype: torch.dtype = torch.float64


CASES = {
    "all phases": Case(),
    "micro-batches": Case(step=in_parts),
    "another batch size costs one graph of any size": Case(sizes=(6, 5, 7, 3), graphs=2),
    "autocast": Case(step=in_bfloat16, dtype=torch.float32),
    "activation checkpointing": Case(Checkpointed),
    "outputs changed in place": Case(InPlace),
    "two forward passes at once": Case(step=two_at_once),
    "a graph break in the model": Case(Broken, graphs=None),
    "only a part of the model is compiled": Case(graphs=None, compiled=one_layer),
    "a layer outside of the graphs": Case(Uncompiled, graphs=None),
    "a retained graph": Case(step=retained, graphs=None),
    "another forward on the model": Case(graphs=None, compiled=replaced),
    "attributes set in a forward pass": Case(Noting),
    "inputs and frozen parameters that a forward pass changes": Case(Changing, graphs=None),
    "an empty batch": Case(step=and_nothing, graphs=None),
}


def compare(model: nn.Module, case: Case, sharing: str) -> None:
    """The compiled run has the eager one's numbers, bit for bit where it is one graph, and took that many graphs.

    To rounding where sample weights are 1, as with sharing "uniform": a graph multiplies by them.
    """
    counter, models, found = CompileCounterWithBackend("aot_eager"), [model, copy.deepcopy(model)], []
    make = case.compiled or (lambda model: torch.compile(model, backend=counter, fullgraph=case.graphs is not None))
    for each, called in zip(models, (model, make(models[1])), strict=True):
        optimizer = FNGD(each, lr=1e-2, **settings_of(sharing, damping=0.01, coefficient_steps=3))
        for step in range(9):  # coefficient steps, the switch and shared steps, where the policy has them
            case.step(called, *data(case.sizes[step % len(case.sizes)], 4, seed=step, dtype=case.dtype))
            optimizer.step()
            optimizer.zero_grad()
        found.append((optimizer.coverage(), str(optimizer.preconditioner.state_dict())))
    assert found[0][0] == found[1][0]
    assert set(found[0][0].missed) == ({"fc2.weight", "fc2.bias"} if isinstance(model, Elsewhere) else set())
    if case.graphs is None or sharing == "uniform" or found[0][0].missed:
        tolerance = 1e-5 if case.dtype == torch.float32 else 1e-9
        torch.testing.assert_close([*models[0].parameters()], [*models[1].parameters()], rtol=tolerance, atol=tolerance)
    else:
        assert_equal(*models)
        assert found[0] == found[1]
        assert counter.frame_count == case.graphs


@pytest.mark.parametrize("sharing", policy_names())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_compiled_model_trains_as_the_eager_one_does(case: Case, sharing: str) -> None:
    compare(net(cls=case.cls, dtype=case.dtype), case, sharing)


@pytest.mark.parametrize(("layer_type", "bias"), LAYERS)
def test_every_kind_of_layer_with_a_gram_matrix(layer_type: str, bias: str) -> None:
    compare(net(layer_type=layer_type, bias=bias), Case(), "replay")


def test_a_layer_that_is_called_twice_is_clipped_call_by_call() -> None:
    compare(net(cls=Twice), Case(), "clipped")


def of_one_graph(model: nn.Module) -> Called:
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def test_it_is_plain_where_there_is_a_gram_matrix_from_the_second_step_on_and_reported() -> None:
    plain, model, (x, y) = net(cls=Twice), net(cls=Twice), data(6, 4)
    preconditioner = FNGDPreconditioner(model, damping=0.01, sharing="never")
    called = of_one_graph(model)
    for _ in range(2):
        model.zero_grad()
        once(called, x, y)
        preconditioner.step()
    once(plain, x, y)
    torch.testing.assert_close(model.again.weight.grad, plain.again.weight.grad)
    assert not torch.allclose(model.fc1.weight.grad, plain.fc1.weight.grad, rtol=1e-2)
    assert set(preconditioner.coverage().missed) == {"again.weight", "again.bias"}


def test_the_operators_stay_out_of_cuda_graphs() -> None:
    for operator in (torch.ops.hf_fngd.begin, torch.ops.hf_fngd.sample_weights):
        assert torch.Tag.cudagraph_unsafe in operator.default.tags


def test_backward_is_plain_after_the_step_and_after_detaching() -> None:
    model, (x, y) = net(), data(6, 4)
    plain, optimizer = copy.deepcopy(model), FNGD(model)
    once(plain, x, y)
    called = of_one_graph(model)
    late = F.cross_entropy(called(x), y)
    once(called, x, y)
    optimizer.preconditioner.step()
    for is_attached in (True, False):
        model.zero_grad()
        if is_attached:
            late.backward()
        else:
            optimizer.detach()  # the model compiles anew
            once(called, x, y)
        torch.testing.assert_close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_weight_that_is_used_elsewhere_is_found(dtype: torch.dtype) -> None:
    """By an eager pass of the first batch, with or without autocast."""
    compare(net(cls=Elsewhere, dtype=dtype), Case(step=in_bfloat16 if dtype == torch.float32 else once), "clipped")


class Mode(StrEnum):
    A = "a"


@pytest.mark.parametrize(
    "other", [Mode.A, {Mode.A: 2}, 2**63, "text", ["text"], 0.5, torch.eye(6).to_sparse()], ids=repr
)
def test_a_rehearsal_leaves_out_what_it_does_not_take(other: Any) -> None:
    class Odd(Net):
        def forward(self, x: Tensor, other: Any = None) -> Tensor:
            return super().forward(x)

    model, (x, y) = net(cls=Odd), data(6, 4)
    preconditioner = FNGDPreconditioner(model)
    F.cross_entropy(torch.compile(model, backend="aot_eager")(x, other=other), y).backward()
    preconditioner.step()
    assert not preconditioner.coverage().missed
