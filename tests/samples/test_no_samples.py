"""Rows that are as many as the samples, and are none: tokens, experts, tables of the model's own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fngd import FNGDPreconditioner
from hf_fngd.samples.rows import NOT_THE_BATCH
from tests.reference import Clipping, uses_of
from tests.samples.orders import CLASSES, DAMPING, WIDTH, expected


class Experts(nn.Module):
    """Tokens go to the expert that ``routes`` ``[N, T]`` names; attention over the positions comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.fc0, self.fc1, self.fc2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])

    def forward(self, x: Tensor, routes: Tensor) -> Tensor:
        y = self.fc1(self.fc0(x).tanh())
        tokens = (y @ y.mT).softmax(-1).matmul(y).flatten(0, 1)
        found = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows = (routes.flatten() == number).nonzero()[:, 0]
            found = found.index_add(0, rows, expert(tokens[rows]))
        return self.fc2(found.unflatten(0, routes.shape).tanh()).mean(1)


ROUTES = {
    "one of the first sample, unlike of others": [[0, 1, 1], [0, 0, 0], [1, 1, 1], [1, 1, 1]],
    "two of the first sample, unlike of others": [[0, 0, 1], [0, 0, 0], [0, 1, 1], [0, 0, 1]],
    "as many of each sample": [[0, 1, 1], [0, 1, 1], [1, 1, 0], [1, 0, 1]],
}


@pytest.mark.parametrize("routes", ROUTES.values(), ids=ROUTES)
def test_an_expert_is_weighed_only_if_every_sample_has_its_share(routes: list[list[int]]) -> None:
    torch.manual_seed(0)
    model, route = Experts().double(), torch.tensor(routes)
    plain, x = copy.deepcopy(model), torch.randn(4, 3, WIDTH, dtype=torch.float64)
    x[2] *= 20
    preconditioner = FNGDPreconditioner(model)
    for net in (model, plain):
        net(x, route).square().sum().backward()
    preconditioner.step()
    equal = len({sum(row) for row in routes}) == 1
    modules = ["fc0", "fc1", "fc2"] + ["experts.0", "experts.1"] * equal
    found = preconditioner.coverage()
    assert ("experts.0.weight" in found.missed) == ("experts.1.weight" in found.missed) == (not equal)

    def share(model: nn.Module, n: int) -> Tensor:
        return model(x[n : n + 1], route[n : n + 1]).square().sum()

    names = {name for name, _ in plain.named_parameters()}
    wanted = {name: p.grad for name, p in plain.named_parameters()}
    plain.zero_grad()
    wanted |= Clipping().gradients([uses_of(plain, modules, share, n, names) for n in range(4)])[0]
    for name, g in wanted.items():
        own = model.get_parameter(name).grad
        torch.testing.assert_close(own, g.view_as(own), rtol=1e-7, atol=1e-10, msg=name)


class Stream(nn.Module):
    """Texts one behind the other in one row of tokens, ``[tokens]``, with attention within each text."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc, self.head = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids: Tensor, ends: Tensor) -> Tensor:
        text = torch.searchsorted(ends, torch.arange(len(input_ids)), right=True)
        y = self.fc(self.table(input_ids))
        scores = (y @ y.t()).masked_fill(text[:, None] != text, -torch.inf).softmax(-1)
        return self.head(torch.tanh(scores @ y)).mean(0, keepdim=True)


def test_tokens_of_a_row_are_no_samples() -> None:
    model = Stream().double()
    preconditioner = FNGDPreconditioner(model)
    ids, ends = torch.arange(11) % 9, torch.tensor([4, 7, 11])
    plain = torch.autograd.grad(model(ids, ends).square().sum(), list(model.parameters()))
    model(ids, ends).square().sum().backward()
    preconditioner.step()
    for p, g in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, g)
    report = preconditioner.coverage()
    assert not report.preconditioned
    assert not report.weighed


class Rows(nn.Module):
    """A layer that sees some rows of its own in the first step, which are as many as there are samples, or fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0
        self.fc1, self.fc2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.register_buffer("table", torch.randn(20, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(self.table[: self.rows].to(x)).mean(0) if self.rows else self.fc1(x)
        return self.fc2(y.tanh() + x)


@pytest.mark.parametrize("rows", [5, 3])
def test_an_odd_first_batch_is_neither_believed_nor_the_last_word(rows: int) -> None:
    model = Rows().double()
    plain = copy.deepcopy(model)
    preconditioner = FNGDPreconditioner(model, sharing="never", damping=DAMPING)
    x, y = torch.randn(5, WIDTH, dtype=torch.float64), torch.arange(5) % CLASSES
    for model.rows in (rows, 0):
        plain.rows = model.rows
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        preconditioner.step()
        if model.rows:
            (g,) = torch.autograd.grad(F.cross_entropy(plain(x), y), [plain.fc1.weight])
        else:
            g = expected(plain, x, y, "never", 0, ["fc1"])["fc1.weight"]
        torch.testing.assert_close(model.fc1.weight.grad, g)
        assert preconditioner.coverage().missed["fc1.weight"] == NOT_THE_BATCH


class Pairs(nn.Module):
    """Looks up a table of ids of its own, which has as many rows as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x + self.table(torch.arange(10).view(5, 2) % 9).mean((0, 1)))


def test_rows_of_ids_of_the_models_own_are_no_samples() -> None:
    model = Pairs().double()
    plain = copy.deepcopy(model)
    preconditioner = FNGDPreconditioner(model)
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    for net in (model, plain):
        net(x).square().sum().backward()
    preconditioner.step()
    torch.testing.assert_close(model.table.weight.grad, plain.table.weight.grad)
    assert preconditioner.coverage().plain == {"table.weight": NOT_THE_BATCH}


class Routed(nn.Module):
    """An expert sees the tokens that a router sends it, of which there are as many as samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.expert, self.head = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.first(x).flatten(0, 1)
        chosen = tokens[:, 0].topk(len(x)).indices
        return self.head(tokens.index_add(0, chosen, self.expert(tokens[chosen])).view(x.shape)).mean(1)


def test_as_many_routed_tokens_as_samples_are_none() -> None:
    torch.manual_seed(0)
    model = Routed().double()
    plain = copy.deepcopy(model)
    preconditioner = FNGDPreconditioner(model)
    x = torch.randn(5, 4, WIDTH, dtype=torch.float64)
    for net in (model, plain):
        net(x).square().sum().backward()
    preconditioner.step()
    torch.testing.assert_close(model.expert.weight.grad, plain.expert.weight.grad)
    assert not torch.allclose(model.head.weight.grad, plain.head.weight.grad)
    assert set(preconditioner.coverage().missed) == {"expert.weight", "expert.bias"}
