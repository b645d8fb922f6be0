"""Who is a sample: what the probe tells of batches that sizes get wrong, against the oracle, and what it leaves."""

import copy
import dataclasses
import random
from collections import UserDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from hf_fngd import FNGDPreconditioner
from hf_fngd.samples.inputs import CannotProbeError, resized, sizes_of
from hf_fngd.samples.probe import probe
from hf_fngd.samples.rows import View
from tests.nets import settings_of
from tests.samples.orders import CLASSES, DAMPING, WIDTH, Attention, batch, build, expected


@pytest.mark.parametrize("sharing", ["never", "clipped"])
@pytest.mark.parametrize(("first", "later"), [((5, 7), (3, 4)), ((6, 6), (6, 6)), ((1, 4), (5, 3)), ((2, 2), (4, 1))])
@pytest.mark.parametrize("order", ["batch first", "time first", "folded, samples first", "folded, positions first"])
def test_samples_are_weighed_wherever_they_are(
    order: str, first: tuple[int, int], later: tuple[int, int], sharing: str
) -> None:
    if order == "time first" and first[0] == 1:
        pytest.skip("the batch begins with positions, and is no batch of one")
    model, dim = build(order), int(order == "time first")
    plain = copy.deepcopy(model)
    settings = settings_of(sharing, damping=DAMPING)
    preconditioner = FNGDPreconditioner(model, strict=True, **settings)
    modules = ["fc1", "fc2", "fc3"] + ["norm", "rms"] * (sharing == "clipped")
    for sizes in (first, later):
        x, y = batch(*sizes, order)
        x.select(dim, 0).mul_(20)
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        preconditioner.step()
        for name, g in expected(plain, x, y, sharing, dim, modules).items():
            torch.testing.assert_close(model.get_parameter(name).grad, g, rtol=1e-7, atol=1e-10, msg=name)
    assert preconditioner.coverage().missed == {}
    assert preconditioner.coverage().note == ""


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("sizes", [(5, 7), (6, 6), (1, 4)])
@pytest.mark.parametrize("order", ["batch first", "time first", "folded, samples first", "folded, positions first"])
def test_samples_are_told_in_bf16_too(order: str, sizes: tuple[int, int]) -> None:
    if order == "time first" and sizes[0] == 1:
        pytest.skip("the batch begins with positions, and is no batch of one")
    model, dim = build(order).float(), int(order == "time first")
    exact = copy.deepcopy(model).double()
    preconditioner = FNGDPreconditioner(model, strict=True, **settings_of("clipped"))
    x, y = batch(*sizes, order)
    x.select(dim, 0).mul_(20)
    with torch.autocast("cpu", torch.bfloat16):
        F.cross_entropy(model(x.float()), y).backward()
    preconditioner.step()
    for name, g in expected(exact, x, y, "clipped", dim, ["fc1", "fc2", "fc3"]).items():
        error = (model.get_parameter(name).grad - g).norm() / g.norm()
        assert error < 0.1, (name, error)


class RoundsByBatch(nn.Linear):
    """A frozen layer in half precision whose last bits depend on the number of samples, as those of GPU kernels do."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x.to(self.weight.dtype)).float()
        return y * (1 + 4e-3 * (-1) ** (torch.arange(y.shape[-1]) + len(x)))


@pytest.mark.filterwarnings("ignore:FNGD preconditions 0 parameters:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_layer_in_half_precision_rounds_does_not_hide_the_samples(dtype: torch.dtype) -> None:
    """As in adapters in float32 on a model in bfloat16."""
    torch.manual_seed(0)
    model = nn.Sequential(RoundsByBatch(8, 8).to(dtype).requires_grad_(False), nn.Linear(8, 3))
    preconditioner = FNGDPreconditioner(model)
    model(torch.randn(6, 8)).sum().backward()
    preconditioner.step()
    assert bool(preconditioner.coverage().missed) == (dtype == torch.float32)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("sizes", [(5, 7), (6, 6)])
@pytest.mark.parametrize("order", ["batch first", "time first", "folded, samples first", "folded, positions first"])
def test_samples_are_told_in_compiled_models_too(order: str, sizes: tuple[int, int]) -> None:
    """By the first batch; where that is not first, its own gradient is plain, and the graph is made anew."""
    dim, counter = int(order == "time first"), CompileCounterWithBackend("aot_eager")
    model = build(order)
    plain = copy.deepcopy(model)
    preconditioner = FNGDPreconditioner(model, **settings_of("clipped"))
    called = torch.compile(model, backend=counter, fullgraph=True)
    x, y = batch(*sizes, order)
    x.select(dim, 0).mul_(20)
    for step in range(3):
        model.zero_grad()
        torch.manual_seed(step)
        F.cross_entropy(called(x), y).backward()
        preconditioner.step()
        drawn = torch.get_rng_state()
        torch.manual_seed(step)
        F.cross_entropy(plain(x), y)
        assert torch.equal(drawn, torch.get_rng_state())
        if step or not dim:
            for name, g in expected(plain, x, y, "clipped", dim, ["fc1", "fc2", "fc3", "norm"]).items():
                torch.testing.assert_close(model.get_parameter(name).grad, g, rtol=1e-7, atol=1e-10, msg=name)
    report = preconditioner.coverage()
    assert (report.missed, report.note) == ({}, "")
    assert ("rms.weight" in report.weighed) == (order == "batch first")  # a graph has its samples summed up elsewhere
    assert counter.frame_count == 1 + dim


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("given", "reason"), [(object(), "inputs that are no tensors"), (None, "RuntimeError: eager")])
def test_a_compiled_model_that_cannot_run_eagerly_is_told_by_sizes(given: object, reason: str) -> None:
    class Odd(Attention):
        def forward(self, x: Tensor, other: Any = None) -> Tensor:
            if other is None and not torch.compiler.is_compiling():
                raise RuntimeError("eager")
            return super().forward(x)

    torch.manual_seed(0)
    model = Odd().double()
    preconditioner = FNGDPreconditioner(model)
    x, y = batch(5, 4, "batch first")
    F.cross_entropy(torch.compile(model, backend="aot_eager")(x, given), y).backward()
    preconditioner.step()
    assert preconditioner.coverage().missed == {}
    assert reason in preconditioner.coverage().note


@pytest.mark.parametrize(("dtype", "factor"), [(torch.bfloat16, 1e3), (torch.float32, 1e5), (torch.float64, 1e10)])
def test_an_outsized_row_does_not_hide_what_became_of_the_others(dtype: torch.dtype, factor: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 5).to(dtype)
    x[3] *= factor

    def run(args: Any, kwargs: Any) -> Any:
        (x,) = args
        mixed = x + x.clamp(-3, 3).mean(0)  # as far as the samples change each other, the outsized one hardly does
        return {place: [(tuple(x.shape), values[:, 0])] for place, values in enumerate([mixed, x, x, x])}

    found = probe(nn.Linear(5, 5), run, ((x,), {}), x, None)
    assert isinstance(found.verdicts[0], str)
    assert [found.verdicts[place] for place in (1, 2, 3)] == [View(0, "one")] * 3


class Trained(nn.Module):
    """Keeps counts, draws numbers, and cannot stand another batch size in evaluation where it is told so."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 5), nn.Linear(5, CLASSES)
        self.norm, self.drop = nn.BatchNorm1d(5), nn.Dropout()
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[int] = []
        self.cache: Tensor | None = None
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        if self.fails and not self.training:
            raise ValueError("training only")
        self.calls += 1
        self.seen.append(len(x))
        self.cache = x
        random.random()
        noise = torch.rand(())
        return self.fc2(self.drop(self.norm(self.fc1(x)))) + 0 * noise


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_a_probe_remains(fails: bool) -> None:
    model, x = Trained(fails), torch.randn(5, WIDTH)
    model.drop.eval()
    model.drop.p = 0.5
    other = copy.deepcopy(model)
    watched: list[int] = []
    for net in (model, other):
        net.fc1.register_forward_hook(lambda _, args, output: watched.append(len(args[0])))
    preconditioner = FNGDPreconditioner(model)
    outputs = []
    for net in (model, other):
        torch.manual_seed(3)
        random.seed(3)
        outputs.append((net(x), torch.rand(2), random.random()))
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*outputs, strict=True))
    assert [module.training for module in model.modules()] == [module.training for module in other.modules()]
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert watched == [5, 5]
    assert model.seen == [5]
    assert model.cache is x
    assert ("training only" in preconditioner.coverage().note) == fails
    assert ("batch_dim" in str(preconditioner.coverage())) == fails


def test_a_probe_leaves_no_casts_without_a_graph_behind() -> None:
    model = Trained()
    preconditioner = FNGDPreconditioner(model, exclude_modules=["fc2"], sharing="uniform")
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(5, WIDTH)).sum().backward()
    assert model.fc2.weight.grad is not None
    preconditioner.step()
    assert preconditioner.coverage().preconditioned == ("fc1.weight", "fc1.bias")
    assert preconditioner.coverage().note == ""


class CalledAgain(Attention):
    """A layer of it is called once more in training."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.fc3(x).mean(1) if self.training else super().forward(x)


class AnotherLayer(Attention):
    """A layer of it runs in training alone, as an auxiliary head does."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.auxiliary(x).mean(1) if self.training else super().forward(x)


def test_a_layer_of_which_the_probe_did_not_see_a_call_is_named() -> None:
    for model, name in ((Attention(), ""), (CalledAgain(), "fc3"), (AnotherLayer(), "auxiliary")):
        preconditioner = FNGDPreconditioner(model.double(), strict=True)
        for sizes in ((5, 7), (6, 4)):
            x, y = batch(*sizes, "batch first")
            F.cross_entropy(model(x), y).backward()
            preconditioner.step()
        note = f"which rows are whose sample was told by sizes alone for {name}.weight, as the probe, in evaluation"
        assert (note in str(preconditioner.coverage())) == bool(name)
        assert preconditioner.coverage().note.startswith(note) == bool(name)


@dataclasses.dataclass
class Inputs:
    x: Tensor
    more: Any = None


def test_what_holds_a_batch_is_made_smaller_or_larger() -> None:
    x, images = torch.arange(6).view(3, 2), [object() for _ in range(3)]
    holds = {
        "a": [x, "text"],
        "b": (x, None, 1.5),
        "c": Inputs(x, {"ids": x}),
        "d": UserDict(x=x),
        "e": ["p", "q", "r"],
        "f": [{"boxes": x[:n]} for n in (2, 3, 1)],
        "g": images,
        "h": [x, {"x": x}],
    }
    found = resized(holds, 3, 0)
    for one in (found["a"][0], found["b"][0], found["c"].x, found["c"].more["ids"], found["d"]["x"]):
        assert torch.equal(one, x[1:])
    assert found["e"] == ["q", "r"]
    assert [sorted(one) for one in found["f"]] == [["boxes"], ["boxes"]]
    assert torch.equal(found["f"][0]["boxes"], x)  # as many boxes as the batch has samples, by chance
    assert found["g"] == images[1:]
    assert torch.equal(found["h"][1]["x"], x[1:])  # two items are not three samples
    assert sizes_of(holds, 3, 0) == sizes_of({key: holds[key] for key in "abcdh"}, 3, 0)
    assert holds["d"]["x"] is x
    assert torch.equal(resized(x[:1], 1, 0), torch.cat([x[:1], x[:1]]))
    assert torch.equal(resized(x, 2, 1), x[:, 1:])
    backwards = resized(holds, 3, 0, reverse=True)
    assert torch.equal(backwards["a"][0], x[[2, 1]])
    assert backwards["e"] == ["r", "q"]
    assert backwards["g"] == images[:0:-1]
    assert resized([{"boxes": x}], 1, 0) == [{"boxes": x}] * 2
    with pytest.raises(CannotProbeError, match="generator"):
        resized([iter(x) for _ in [0]] and (n for n in x), 3, 0)
