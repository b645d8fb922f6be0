"""A probe runs the model on copies of its inputs, and leaves no trace in what the model holds."""

import collections
import copy
import dataclasses
import random
from collections import UserDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_fngd import FNGDPreconditioner
from hf_fngd.samples.inputs import copied
from tests.steps import gradient


@dataclasses.dataclass
class Batch:
    x: Tensor


class Changing(nn.Module):
    """Changes its input, in one of several ways, before it computes."""

    def __init__(self, change: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.change = change
        self.fc1, self.fc2 = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, batch: Any) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(self.change(batch))))


def of_a_batch(batch: Batch) -> Tensor:
    batch.x = batch.x * 2
    return batch.x


CHANGES: dict[str, tuple[Callable[[Any], Tensor], Callable[[Tensor], Any]]] = {
    "in place": (lambda x: x.sub_(1).mul_(3), lambda x: x),
    "popped": (lambda batch: batch["x"] + batch.pop("offset"), lambda x: {"x": x, "offset": x.mean()}),
    "popped from an encoding": (lambda batch: batch.data.pop("x"), lambda x: UserDict({"x": x})),
    "from a list": (lambda batch: batch.pop(0), lambda x: [x, x * 0]),
    "within": (lambda batch: batch["of"][0].add_(1), lambda x: {"of": (x,)}),
    "a dataclass": (of_a_batch, Batch),
}


@pytest.mark.parametrize(("change", "wrap"), CHANGES.values(), ids=CHANGES)
def test_a_forward_pass_may_change_its_inputs(change: Callable[[Any], Tensor], wrap: Callable[[Tensor], Any]) -> None:
    torch.manual_seed(0)
    model, x = Changing(change).double(), torch.randn(4, 5, dtype=torch.float64)
    plain = copy.deepcopy(model)
    preconditioner = FNGDPreconditioner(model, sharing="uniform")
    for each in (model, plain):
        each(wrap(x.clone())).square().sum().backward()
    assert torch.equal(gradient(model), gradient(plain))
    assert preconditioner.coverage().note == ""


def test_copies_of_inputs_keep_their_types() -> None:
    pair = collections.namedtuple("pair", "a b")
    x = torch.ones(2, requires_grad=True)
    found = copied({"t": pair(x, 1), "l": [x, None], "d": Batch(x), "u": UserDict(x=x), "s": "text"})
    assert type(found["t"]) is pair
    assert type(found["u"]) is UserDict
    for other in (found["t"].a, found["l"][0], found["d"].x, found["u"]["x"]):
        assert other is not x
        assert other.requires_grad
        assert torch.equal(other, x)


class Counting:
    """No module: an object of the user's own."""

    def __init__(self) -> None:
        self.n = 0


class Keeping(nn.Module):
    """Keeps something of every forward pass, in every way that there is."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 2)
        self.queue, self.counter = collections.deque([1], maxlen=9), collections.Counter[str]()
        self.ordered, self.lists = collections.OrderedDict(a=1), collections.defaultdict[str, list[int]](list)
        self.nested, self.members = {"list": [1]}, {1}
        self.tensor, self.of_tuple, self.array = torch.zeros(2), (torch.zeros(1),), np.zeros(2)
        self.generator, self.own = torch.Generator().manual_seed(4), random.Random(4)
        self.of_numpy, self.older = np.random.default_rng(4), np.random.RandomState(4)
        self.object, self.n = Counting(), 0
        self.hidden = [nn.BatchNorm1d(5)]  # no submodule, and in training mode

    def forward(self, x: Tensor) -> Tensor:
        self.queue.append(len(x))
        self.counter["calls"] += 1
        self.ordered["b"] = len(self.ordered)
        self.lists["sizes"].append(len(x))
        self.nested["list"].append(len(x))
        self.members.add(len(x))
        for kept in (self.tensor, self.of_tuple[0], self.array):
            kept += 1
        self.drawn()
        self.object.n += 1
        self.n += 1
        return self.fc(self.hidden[0](x))

    def drawn(self) -> list[float]:
        from_torch = torch.rand(1, generator=self.generator).item()
        return [from_torch, self.own.random(), self.of_numpy.random(), self.older.random()]

    def state(self) -> list[Any]:
        containers = [self.queue, self.counter, self.ordered, self.lists, self.nested, self.members]
        numbers = [x.tolist() for x in (self.tensor, self.of_tuple[0], self.array)]
        hidden = [(name, x.tolist()) for name, x in self.hidden[0].state_dict().items()]
        return [*containers, *numbers, self.object.n, self.n, hidden, self.drawn()]


def test_what_a_module_holds_is_put_back() -> None:
    torch.manual_seed(0)
    model = Keeping()
    plain = copy.deepcopy(model)
    _kept = FNGDPreconditioner(model)
    x = torch.randn(4, 5)
    for each in (model, plain):
        each(x)
    assert model.state() == plain.state()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_a_model_in_training_is_not_traced_and_one_in_evaluation_is_plain() -> None:
    """A trace would follow the probe, and the process died of it."""
    model, x = nn.Sequential(nn.Linear(5, 6), nn.Tanh()), torch.randn(4, 5)
    _kept = FNGDPreconditioner(model)
    with pytest.raises(RuntimeError, match=r"torch.jit.trace in training mode does not work .* copy.deepcopy\(model\)"):
        torch.jit.trace(model, x)
    assert torch.equal(torch.jit.trace(model.eval(), x)(x), model(x))


class WithACounter(nn.Module):
    """Counts its samples in a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.seen = nn.Linear(5, 2), nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.seen += len(x)
        return self.fc(x)


def test_a_frozen_parameter_in_which_a_model_counts_is_put_back() -> None:
    model = WithACounter()
    preconditioner = FNGDPreconditioner(model)
    model(torch.randn(4, 5)).sum().backward()
    preconditioner.step()
    assert model.seen == 4


class Averaging(nn.Module):
    """Keeps a running average of a size of its own in a frozen parameter, in evaluation mode as well."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.average = nn.Parameter(torch.zeros(size), requires_grad=False)
        self.fc = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.average.lerp_(x.mean(), 0.5)
        return self.fc(x)


@pytest.mark.parametrize("size", [7, 2**18 + 1])
def test_parameters_that_the_probe_changes_are_put_back_or_told(size: int, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, x = Averaging(size), torch.rand(4, 5)
    preconditioner = FNGDPreconditioner(model)
    model(x).sum().backward()
    preconditioner.step()
    told = [record.getMessage() for record in caplog.records if "changes 1 parameters itself" in record.getMessage()]
    if size == 7:
        assert not told
        torch.testing.assert_close(model.average.data, torch.full((7,), float(x.mean()) / 2))
    else:
        assert len(told) == 1
        assert f"shape ({size},)" in told[0]
        assert float(model.average[0].detach()) > 0.6 * float(x.mean())  # the probe's passes are in it
