"""Layers that are called in several ways: other settings of a convolution, other images for a table of positions."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_fngd import FNGDPreconditioner
from hf_fngd.layers.embedding import A_TABLE
from hf_fngd.layers.table import NOT_ON_ROWS
from hf_fngd.samples.rows import NOT_THE_BATCH
from tests.nets import settings_of
from tests.reference import Clipping, Dense, per_sample_gradients, uses_of

WIDTH, LENGTH = 6, 4


class Dilated(nn.Module):
    """One convolution at several dilations, set before each call."""

    def __init__(self, passes: int) -> None:
        super().__init__()
        self.layer, self.head, self.passes = nn.Conv1d(3, 3, 3), nn.Linear(3, 2), passes

    def forward(self, x: Tensor, dilation: int = 1) -> Tensor:
        y = x
        for d in range(dilation, dilation + self.passes):
            self.layer.dilation, self.layer.padding = (d,), (d,)
            y = torch.tanh(self.layer(y))
        return self.head(y.mean(2))


def test_each_call_of_a_convolution_keeps_its_settings() -> None:
    torch.manual_seed(0)
    model = Dilated(3).double()
    plain, x = copy.deepcopy(model), torch.randn(5, 3, 9, dtype=torch.float64)
    _kept = FNGDPreconditioner(model, sharing="uniform")
    found = []
    for one in (model, plain):
        leaf = x.clone().requires_grad_()
        one(leaf).square().sum().backward()
        found.append([leaf.grad, *(p.grad for p in one.parameters())])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("sharing", ["clipped", "never"])
def test_a_pass_that_comes_before_another_has_its_own_settings(sharing: str) -> None:
    torch.manual_seed(0)
    model = Dilated(1).double()
    plain, x = copy.deepcopy(model), torch.randn(5, 3, 9, dtype=torch.float64)
    x[1] *= 10
    preconditioner = FNGDPreconditioner(model, **settings_of(sharing, damping=0.03))
    first = model(x).square().sum(1).mean()
    model(x, 3)  # its output is dropped
    first.backward()
    preconditioner.step()

    def alone(model: nn.Module, n: int) -> Tensor:
        return model(x[n : n + 1]).square().sum()

    def share(model: nn.Module, n: int) -> Tensor:
        return alone(model, n) / 5

    own = dict(plain.layer.named_parameters("layer"))
    if sharing == "clipped":
        trained = {name for name, _ in plain.named_parameters()}
        wanted, _ = Clipping().gradients([uses_of(plain, ["layer"], share, n, trained) for n in range(5)])
    else:
        p = Dense(per_sample_gradients(plain, list(own.values()), alone, 5), 0.03).p
        wanted = dict(zip(own, p.split([q.numel() for q in own.values()]), strict=True))
    for name, g in wanted.items():
        grad = model.get_parameter(name).grad
        assert grad is not None
        torch.testing.assert_close(grad, g.view_as(grad), rtol=1e-7, atol=1e-10, msg=name)


class Channels(nn.Module):
    """Positions that are added to ``[N, C, T, d]``, as in video."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.positions, self.head = nn.Linear(3, WIDTH), nn.Embedding(LENGTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.into(x) + self.positions(torch.arange(LENGTH)[None]))).mean((1, 2))


@pytest.mark.parametrize("channels", [3, 5])
def test_positions_that_are_added_to_more_dimensions_are_plain(channels: int) -> None:
    torch.manual_seed(0)
    model = Channels().double()
    plain = copy.deepcopy(model)
    preconditioner = FNGDPreconditioner(model)
    for _ in range(3):
        model.zero_grad()
        plain.zero_grad()
        x = torch.randn(5, channels, LENGTH, 3, dtype=torch.float64)
        for one in (model, plain):
            one(x).square().sum().backward()
        preconditioner.step()
        torch.testing.assert_close(model.positions.weight.grad, plain.positions.weight.grad)
    assert preconditioner.coverage().plain["positions.weight"] == A_TABLE


class Table(nn.Module):
    """Adds positions, interpolated where there are others, and a vector that it reads in a property."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.kind = nn.Parameter(torch.randn(1, LENGTH, WIDTH)), nn.Parameter(torch.randn(1, 1, WIDTH))

    @property
    def twice(self) -> Tensor:
        return 2 * self.kind

    def forward(self, x: Tensor) -> Tensor:
        positions = self.positions
        if x.shape[1] != LENGTH:
            rows = nn.functional.interpolate(positions.reshape(1, LENGTH, WIDTH).transpose(1, 2), x.shape[1])
            positions = rows.transpose(1, 2)
        return x + positions + self.twice


class Positioned(nn.Module):
    def __init__(self, dim: int = 0) -> None:
        super().__init__()
        self.table: nn.Module = Table()
        self.into, self.dim = nn.Linear(3, WIDTH), dim
        self.middle = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=not dim)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.table(self.into(x)))).mean(1 - self.dim)


def gradients(model: Any, plain: Any, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    for one in (model, plain):
        one.zero_grad()
        one(x).square().sum().backward()
    return {name: (model.get_parameter(name).grad, p.grad) for name, p in plain.named_parameters()}


def test_a_property_of_a_table_reads_the_weighed_parameters() -> None:
    torch.manual_seed(0)
    model = Positioned().double()
    plain = copy.deepcopy(model)
    preconditioner = FNGDPreconditioner(model)
    x = torch.randn(5, LENGTH, 3, dtype=torch.float64)
    x[0] *= 30
    found, _ = gradients(model, plain, x)["table.kind"]
    preconditioner.step()
    assert {"table.positions", "table.kind"} <= set(preconditioner.coverage().weighed)
    each = torch.stack([gradients(plain, plain, x[n : n + 1])["table.kind"][0].flatten() for n in range(5)])
    norms = each.norm(dim=1)
    torch.testing.assert_close(found.flatten(), (norms.mean() / norms).clamp(max=1) @ each)


def test_a_table_is_tried_on_each_size_of_image() -> None:
    torch.manual_seed(0)
    model = Positioned().double()
    plain = copy.deepcopy(model)
    preconditioner = FNGDPreconditioner(model)
    for length in (LENGTH, 2 * LENGTH):
        found = gradients(model, plain, torch.randn(5, length, 3, dtype=torch.float64))
        preconditioner.step()
    torch.testing.assert_close(*found["table.positions"])
    assert preconditioner.coverage().plain["table.positions"] == NOT_ON_ROWS


class Kind(nn.Module):
    """A vector for all positions alone."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = nn.Parameter(torch.randn(1, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.kind


def test_a_table_beside_positions_that_come_first_is_plain() -> None:
    torch.manual_seed(0)
    model = Positioned(dim=1).double()
    model.table = Kind().double()
    plain = copy.deepcopy(model)
    preconditioner = FNGDPreconditioner(model)
    x = torch.randn(LENGTH, LENGTH, 3, dtype=torch.float64)
    x[:, 0] *= 30
    found = gradients(model, plain, x)
    preconditioner.step()
    torch.testing.assert_close(*found["table.kind"])
    assert preconditioner.coverage().plain["table.kind"] == NOT_THE_BATCH
