"""torch.compile: one graph, no break, no recompilation from step to step, and the eager run's numbers."""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from hf_fngd import FNGD, FNGDPreconditioner
from hf_fngd.weights.base import policy_names
from tests.nets import LAYERS, Net, assert_equal, data, net, settings_of

# Raised and ignored by the compiler itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

STEPS = 9


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(lambda y: torch.tanh(self.norm(self.fc1(y))), x, use_reentrant=False)
        return self.fc2(hidden).flatten(1, -2).mean(1)


class Twice(Net):
    """Calls a layer twice."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.again = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.again(torch.tanh(self.again(self.norm(self.fc1(x)))))
        return self.fc2(hidden).flatten(1, -2).mean(1)


def train(
    model: nn.Module,
    compiled: bool,
    *,
    sizes: tuple[int, ...] = (6,),
    accumulate: int = 1,
    bf16: bool = False,
    sharing: str = "clipped",
) -> tuple[nn.Module, FNGD, CompileCounterWithBackend]:
    """Coefficient steps, the switch and shared steps, where the policy has them."""
    counter = CompileCounterWithBackend("aot_eager")
    optimizer = FNGD(model, lr=1e-2, **settings_of(sharing, damping=0.01, coefficient_steps=3))
    # Breaks would raise.
    called: Callable[..., Tensor] = torch.compile(model, backend=counter, fullgraph=True) if compiled else model
    for step in range(STEPS):
        for part in range(accumulate):
            x, y = data(sizes[step % len(sizes)], 4, seed=10 * step + part, dtype=next(model.parameters()).dtype)
            with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
                F.cross_entropy(called(x).float() if bf16 else called(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, counter


def compare(model: nn.Module, graphs: int = 1, **options: Any) -> FNGD:
    """The compiled run equals the eager one bit for bit, and took that many graphs.

    With sharing "uniform" to rounding: a graph multiplies by its sample weights of 1.
    """
    eager, slow, _ = train(copy.deepcopy(model), compiled=False, **options)
    fast, optimizer, counter = train(model, compiled=True, **options)
    assert counter.frame_count == graphs
    if options.get("sharing") == "uniform":
        torch.testing.assert_close([*fast.parameters()], [*eager.parameters()], rtol=1e-12, atol=1e-14)
    else:
        assert_equal(fast, eager)
    assert optimizer.coverage() == slow.coverage()
    assert not optimizer.coverage().missed
    assert str(optimizer.preconditioner.state_dict()) == str(slow.preconditioner.state_dict())
    return optimizer


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("sharing", policy_names())
def test_one_graph_through_all_phases(sharing: str, accumulate: int) -> None:
    compare(net(), sharing=sharing, accumulate=accumulate)


@pytest.mark.parametrize(("layer_type", "bias"), LAYERS)
def test_every_kind_of_layer_with_a_gram_matrix(layer_type: str, bias: str) -> None:
    compare(net(layer_type=layer_type, bias=bias), sharing="replay")


def test_the_operators_stay_out_of_cuda_graphs() -> None:
    for operator in (torch.ops.hf_fngd.begin, torch.ops.hf_fngd.sample_weights):
        assert torch.Tag.cudagraph_unsafe in operator.default.tags


@pytest.mark.parametrize("sharing", ["clipped", "replay"])
def test_another_batch_size_costs_one_graph_of_any_size(sharing: str) -> None:
    compare(net(), graphs=2, sizes=(6, 5, 7, 3), sharing=sharing)


@pytest.mark.parametrize("sharing", ["clipped", "replay"])
def test_autocast(sharing: str) -> None:
    compare(net(dtype=torch.float32), bf16=True, sharing=sharing)


@pytest.mark.parametrize("sharing", ["clipped", "replay"])
def test_activation_checkpointing(sharing: str) -> None:
    torch.manual_seed(0)
    compare(Checkpointed().double(), sharing=sharing)


def test_a_layer_that_is_called_twice_is_plain_from_the_second_step_on_and_reported() -> None:
    torch.manual_seed(0)
    plain = Twice().double()
    model = copy.deepcopy(plain)
    preconditioner = FNGDPreconditioner(model, damping=0.01, sharing="never")
    called = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, y = data(6, 4)
    for _ in range(2):
        model.zero_grad()
        F.cross_entropy(called(x), y).backward()
        preconditioner.step()
    F.cross_entropy(plain(x), y).backward()
    torch.testing.assert_close(model.again.weight.grad, plain.again.weight.grad)
    assert not torch.allclose(model.fc1.weight.grad, plain.fc1.weight.grad, rtol=1e-2)
    assert set(preconditioner.coverage().missed) == {"again.weight", "again.bias"}


def test_a_layer_that_is_called_twice_is_clipped_call_by_call() -> None:
    torch.manual_seed(0)
    compare(Twice().double())


class InPlace(Net):
    """Changes the outputs of its layers in place."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu_(self.norm(self.fc1(x).mul_(2)))).mul_(2).flatten(1, -2).mean(1)


def test_the_output_of_a_layer_can_be_changed_in_place() -> None:
    torch.manual_seed(0)
    compare(InPlace().double())


def test_backward_after_the_step_is_plain() -> None:
    model = net()
    plain = copy.deepcopy(model)
    preconditioner = FNGDPreconditioner(model)
    called = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, y = data(6, 4)
    late = F.cross_entropy(called(x), y)
    F.cross_entropy(called(x), y).backward()
    preconditioner.step()
    model.zero_grad()
    late.backward()
    F.cross_entropy(plain(x), y).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_two_forward_passes_before_their_backward_passes_keep_apart() -> None:
    def gradients(compiled: bool) -> list[Tensor]:
        model = net()
        FNGD(model, damping=0.01, sharing="never")
        called = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        losses = [F.cross_entropy(called(x), y) for x, y in (data(6, 4), data(6, 4, seed=2))]
        losses[1].backward()
        losses[0].backward()
        return [p.grad for p in model.parameters()]

    assert all(torch.equal(p, q) for p, q in zip(gradients(True), gradients(False), strict=True))


def test_a_model_that_is_detached_compiles_anew() -> None:
    model = net()
    optimizer = FNGD(model)
    called = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, y = data(6, 4)
    F.cross_entropy(called(x), y).backward()
    optimizer.detach()
    model.zero_grad()
    F.cross_entropy(called(x), y).backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    for p, q in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(p.grad, q)


# Not one graph, or one that is used in unusual ways ------------------------------------------------------

Call = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], None]


def whole(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, backend="aot_eager")


def once(called: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    F.cross_entropy(called(x), y).backward()


def same_as_eager(
    plain: nn.Module,
    sharing: str,
    compiled: Callable[[nn.Module], Callable[[Tensor], Tensor]] = whole,
    call: Call = once,
) -> None:
    """Train a model and its compiled copy, and expect the same parameters, with every layer preconditioned."""
    models = plain, copy.deepcopy(plain)
    for model, called in zip(models, (models[0], compiled(models[1])), strict=True):
        optimizer = FNGD(model, lr=1e-2, **settings_of(sharing, damping=0.01, coefficient_steps=2))
        for step in range(4):
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


class Uncompiled(Net):
    """One layer runs where the compiler does not go."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.outside(x)))
        return self.fc2(hidden).flatten(1, -2).mean(1)

    @torch.compiler.disable
    def outside(self, x: Tensor) -> Tensor:
        return self.fc1(x)


def blocks(model: nn.Module) -> nn.Module:
    """As libraries compile the repeated blocks of a large model, and leave the rest."""
    model.fc1.compile(backend="aot_eager")
    return model


def twice(called: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    """Two losses of one forward pass, a backward pass for each."""
    output = called(x)
    F.cross_entropy(output, y).backward(retain_graph=True)
    output.square().mean().backward()


def and_nothing(called: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    """The part of a batch that another process got is all of it."""
    once(called, x, y)
    called(x[:0]).sum().backward()


UNUSUAL: dict[str, tuple[type[Net], dict[str, Any]]] = {
    "a graph break in the model": (Broken, {}),
    "only a part of the model is compiled": (Net, {"compiled": blocks}),
    "a layer outside of the graphs": (Uncompiled, {}),
    "a retained graph": (Net, {"call": twice}),
    "an empty batch": (Net, {"call": and_nothing}),
}


@pytest.mark.parametrize("sharing", ["clipped", "replay"])
@pytest.mark.parametrize(("cls", "options"), UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_graphs_train_as_the_eager_model_does(cls: type[Net], options: dict[str, Any], sharing: str) -> None:
    torch.manual_seed(0)
    same_as_eager(cls().double(), sharing, **options)


class Elsewhere(Net):
    """Uses a layer's weight outside of its forward as well."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.fc2.weight.sum(1)


def test_a_weight_that_is_used_elsewhere_is_found_unless_compiled() -> None:
    """A limit, which hf_fngd/engine/backward.py states: the second use is inside of the graph."""
    torch.manual_seed(0)
    x, y = data(6, 4)
    missed = []
    for compiled in (False, True):
        model = Elsewhere().double()
        optimizer = FNGD(model)
        called = torch.compile(model, backend="aot_eager") if compiled else model
        F.cross_entropy(called(x), y).backward()
        optimizer.step()
        missed.append(set(optimizer.coverage().missed))
    assert missed == [{"fc2.weight", "fc2.bias"}, set()]
