"""What public bug reports of other packages tell of, tried here; docs/bug_reports.md lists the reports."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_fngd import FNGD, FNGDPreconditioner
from tests.nets import data, loss, net
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
