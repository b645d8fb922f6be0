"""What public bug reports of other packages tell of, tried here; docs/bug_reports.md lists the reports."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from hf_fngd import FNGD, FNGDPreconditioner
from tests.nets import EVERY_TYPE, data, loss, net
from tests.reference import Clipping, uses_of
from tests.steps import gradient


def batch(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained_alike(model: nn.Module, backward: Callable[[nn.Module], Any], steps: int = 3) -> None:
    """Adam with sample weights of 1 is torch's AdamW, on every parameter that has entries."""
    torch.manual_seed(0)
    plain = copy.deepcopy(model)
    optimizers = [
        FNGD(model, lr=1e-2, sharing="uniform", update="adam"),
        torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0),
    ]
    for _ in range(steps):
        for each, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            backward(each)
            optimizer.step()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12, msg=name)


class Empty(nn.Module):
    """Layers without features, and parameters without entries, behind or before all others."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(5, 0), nn.Embedding(3, 0)])
        self.own = nn.Parameter(torch.zeros(0, 4))
        self.body = nn.Linear(5, 2)
        if not first:
            self.parts = self._modules.pop("parts")  # registered again, behind

    def forward(self, x: Tensor) -> Tensor:
        nothing = self.own.sum() + self.parts[1](torch.zeros(len(x), dtype=torch.long)).sum()
        return self.body(x) + self.parts[0](x).sum() + nothing


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("first", [True, False])
def test_parameters_without_entries_keep_none_of_the_others_from_their_step(first: bool) -> None:
    torch.manual_seed(0)
    x = batch(4, 5)
    trained_alike(Empty(first).double(), lambda model: model(x).square().sum().backward())
    model = Empty(first).double()
    optimizer, before = FNGD(model), copy.deepcopy(model.state_dict())
    model(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before["body.weight"], model.body.weight)
    assert all(p.isfinite().all() for p in model.parameters())


class Spectral(nn.Module):
    """A complex parameter of its own, as Fourier neural operators have it, or a complex layer."""

    def __init__(self, layer: bool) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4, dtype=torch.float64)
        self.filter = nn.Parameter(torch.randn(4, 3, dtype=torch.complex128))
        self.head = nn.Linear(3, 2, bias=False) if layer else nn.Identity()
        if layer:
            self.head.weight = nn.Parameter(torch.randn(2, 3, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).to(torch.complex128) @ self.filter)


def test_complex_parameters_are_stepped_and_complex_layers_refused() -> None:
    torch.manual_seed(0)
    x = batch(6, 5)

    def backward(model: nn.Module) -> None:
        model(x).abs().square().sum().backward()

    trained_alike(Spectral(False), backward)
    with pytest.raises(ValueError, match=r"weights of 1 layers are complex.*exclude_modules=\['head'\]"):
        FNGD(Spectral(True))
    model = Spectral(True)
    optimizer, before = FNGD(model, exclude_modules=["head"]), copy.deepcopy(model.state_dict())
    backward(model)
    optimizer.step()
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_gradient_that_becomes_sparse_later_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 1))
    optimizer = FNGD(model)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.tensor([[1, 2], [3, 1]])).sum().backward()
        if optimizer.state:
            model[0].weight.grad = model[0].weight.grad.to_sparse()
            with pytest.raises(RuntimeError, match=r"no sparse gradients, as 0.weight has"):
                optimizer.step()
        else:
            optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("update", ["muon", "adam"])
def test_moments_follow_a_model_that_is_moved_to_another_precision(update: str, dtype: torch.dtype) -> None:
    model = net()
    optimizer = FNGD(model, update=update, lr=1e-2)
    for step in range(4):
        if step == 2:
            model.to(dtype)
        x, y = data(6, seed=step, dtype=next(model.parameters()).dtype)
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        loss(model, x, y).backward()
        optimizer.step()
        assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())
    moments = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    assert {moment.dtype for moment in moments} == {dtype}


def test_attaching_asks_no_parametrization_for_its_weight() -> None:
    """That of a spectral norm goes a power iteration further each time."""
    model, x = net(), data(6)[0]
    nn.utils.parametrizations.spectral_norm(model.fc1)
    plain = copy.deepcopy(model)
    _kept = FNGDPreconditioner(model, sharing="uniform")
    for each in (model, plain):
        each(x).square().sum().backward()
    assert torch.equal(gradient(model), gradient(plain))


class Words(nn.Module):
    """Word2vec: a table that is called with one id a sample, and again with several."""

    def __init__(self) -> None:
        super().__init__()
        self.target, self.context, self.fc = nn.Embedding(20, 6), nn.Embedding(20, 6), nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        y = self.fc(self.target(ids[:, :1]))
        near, far = self.context(ids[:, 1:2]), self.context(ids[:, 2:])
        return torch.cat([(y * near).sum(-1), -(y * far).sum(-1)], 1)


class InPlace(nn.Module):
    """Changes every layer's output in place."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv, self.norm = nn.Embedding(20, 4), nn.Conv1d(4, 4, 1), nn.LayerNorm(4)
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        y = self.table(ids)
        y *= 2
        z = self.conv(y.transpose(1, 2)).transpose(1, 2).add_(y)
        w = torch.relu_(self.fc1(z)) + 0
        w[:, 0] = 0
        v = self.norm(w)
        v += w.detach()
        u = self.fc2(v)
        u.view(-1)[::2].mul_(2)
        return u + torch.tanh_(self.fc1(w))


class Reversed(nn.Module):
    """A layer behind a reversed gradient, one behind a rounding that passes gradients through, and a shared one."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.domain = nn.Linear(5, 6), nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.body(x))
        against = 2 * y.detach() - y
        through = y + (y.round() - y).detach()
        return self.head(y) + self.domain(against) + self.head(through) + self.domain(y.detach())


class Packed(nn.Module):
    """A layer on the data of a PackedSequence, whose rows are sorted by time; lengths come with the input."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.lstm = nn.Linear(4, 4), nn.LSTM(4, 5, batch_first=True)
        self.on_rows, self.head = nn.Linear(5, 2), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        lengths = x[:, :, 0].ne(0).sum(1)
        packed = nn.utils.rnn.pack_padded_sequence(self.before(x), lengths, batch_first=True, enforce_sorted=False)
        y, (state, _) = self.lstm(packed)
        rows = nn.utils.rnn.PackedSequence(self.on_rows(y.data), y.batch_sizes, y.sorted_indices, y.unsorted_indices)
        padded, _ = nn.utils.rnn.pad_packed_sequence(rows, batch_first=True, total_length=x.shape[1])
        return self.head(state[0]) + padded.sum(1)


class DropPath(nn.Module):
    """In training a block sees some samples alone, as in DINOv2; the first input column says which."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.block, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        kept = torch.arange(len(x)) if not self.training else x[:, 0].gt(0).nonzero()[:, 0]
        return self.head(y.index_add(0, kept, self.block(y[kept]).tanh()))


def ids(*shape: int) -> Tensor:
    return torch.randint(20, shape, generator=torch.Generator().manual_seed(1))


def lengths(*own: int) -> Tensor:
    x = batch(len(own), 4, 4)
    return x * (torch.arange(4) < torch.tensor(own)[:, None])[:, :, None]


def some(*kept: int) -> Tensor:
    x = batch(6, 5)
    x[:, 0] = torch.tensor([1.0 if n in kept else -1.0 for n in range(6)])
    return x


CASES: dict[str, tuple[type[nn.Module], Tensor, set[str]]] = {
    "one table, inputs of two lengths": (Words, ids(5, 9), set()),
    "as many far words as samples": (Words, ids(5, 7), set()),
    "outputs changed in place": (InPlace, ids(5, 3), set()),
    "reversed gradients": (Reversed, batch(6, 5), set()),
    "rows of uneven sequences": (Packed, lengths(3, 2, 4, 1), {"on_rows"}),
    "rows of even sequences": (Packed, lengths(3, 3, 3, 3), set()),
    "as many rows as sequences": (Packed, lengths(1, 1, 1, 1), set()),
    "a block for some samples": (DropPath, some(0, 2, 5), {"block"}),
    "a block for all samples": (DropPath, some(*range(6)), set()),
}


@pytest.mark.parametrize(("cls", "x", "plain"), CASES.values(), ids=CASES)
def test_gradients_are_what_the_report_says(cls: type[nn.Module], x: Tensor, plain: set[str]) -> None:
    """With sample weights of 1 those of the plain model; clipped those of the oracle, but plain where it says so."""
    torch.manual_seed(0)
    model = cls().double()
    scale = torch.ones(len(x), dtype=torch.float64).index_fill(0, torch.tensor(1), 30)

    def share(model: nn.Module, n: int) -> Tensor:
        return scale[n] * model(x[n : n + 1]).square().sum()

    def backward(model: nn.Module) -> dict[str, Tensor]:
        (model(x).square().flatten(1).sum(1) * scale).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    wanted, weighed = backward(copy.deepcopy(model)), copy.deepcopy(model)
    preconditioner = FNGDPreconditioner(weighed, sharing="uniform", layer_types=EVERY_TYPE)
    for name, g in backward(weighed).items():
        torch.testing.assert_close(g, wanted[name], rtol=1e-9, atol=1e-12, msg=name)
    preconditioner.detach()
    other = copy.deepcopy(model)
    preconditioner = FNGDPreconditioner(model, layer_types=EVERY_TYPE)
    found = backward(model)
    preconditioner.step()
    report = preconditioner.coverage()
    assert {name.rpartition(".")[0] for name in report.missed} == plain
    covered = {*report.preconditioned, *report.weighed}
    modules = {name.rpartition(".")[0]: None for name in covered}
    uses = [uses_of(other, modules, share, n, covered) for n in range(len(x))]
    wanted |= Clipping().gradients(uses)[0]
    for name, g in found.items():
        torch.testing.assert_close(g, wanted[name].view_as(g), rtol=1e-9, atol=1e-12, msg=name)


# Errors and what is only told -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch itself
def test_forward_mode_derivatives_name_the_cure() -> None:
    model = nn.Sequential(nn.Linear(5, 2))
    _kept = FNGDPreconditioner(model)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"copy\.deepcopy\(model\)"):
        model(forward_ad.make_dual(*torch.randn(2, 4, 5)))


@pytest.mark.parametrize("positions", [(), (3,)])
def test_batched_gradients_are_weighed_one_by_one(positions: tuple[int, ...]) -> None:
    linear = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 2)).double()
    _kept = FNGDPreconditioner(linear)
    y = linear(batch(4, *positions, 5))
    g = batch(3, *y.shape)
    g[0, 1] *= 30
    expected = [torch.autograd.grad(y, list(linear.parameters()), one, retain_graph=True) for one in g]
    found = torch.autograd.grad(y, list(linear.parameters()), g, is_grads_batched=True)
    for each, wanted in zip(found, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(each, torch.stack(wanted))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_pass_and_are_told(layout: torch.layout) -> None:
    model = nn.Sequential(nn.Linear(5, 2))
    preconditioner = FNGDPreconditioner(model)
    x = torch.nested.nested_tensor([torch.randn(3, 5), torch.randn(2, 5)], layout=layout)
    model(x).to_padded_tensor(0.0).sum().backward()
    preconditioner.step()
    assert set(preconditioner.coverage().missed) == {"0.weight", "0.bias"}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_input_features_passes() -> None:
    model = nn.Sequential(nn.Linear(5, 0), nn.Linear(0, 2))
    _kept = FNGDPreconditioner(model)
    model(torch.randn(4, 3, 5)).sum().backward()
    assert model[1].bias.grad.tolist() == [12, 12]


def test_a_parametrization_of_later_is_evaluated_once() -> None:
    calls = []
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 2))
    _kept = FNGDPreconditioner(model, batch_dim=0)
    model(torch.randn(4, 5)).sum().backward()
    counted = type("Counted", (nn.Module,), {"forward": lambda self, w: calls.append(1) or 2 * w})
    nn.utils.parametrize.register_parametrization(model[0], "weight", counted())
    calls.clear()
    model(torch.randn(4, 5)).sum().backward()
    assert calls == [1]
