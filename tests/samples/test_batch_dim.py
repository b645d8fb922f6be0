"""Which dimension is the batch: found where the first one fails or tells of fewer layers, or given as an argument."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fngd import FNGDPreconditioner
from hf_fngd.layers.base import AMBIGUOUS
from tests.nets import EVERY_TYPE
from tests.reference import Clipping, Dense, per_sample_gradients, uses_of
from tests.samples.orders import CLASSES, DAMPING, WIDTH, Attention, batch


class TimeFirst(nn.Module):
    """Positions first, as torch's recurrent layers have it by default; the head sees the last state alone."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embedding, self.fc1 = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.lstm, self.fc2 = nn.LSTM(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        y = self.fc1(self.embedding(ids))
        if self.kind == "layer":
            return self.fc2(self.lstm(y)[1][0][-1])
        state = torch.zeros_like(y[0])
        for one in y:  # a cell, and as many calls of it as there are positions
            state = torch.tanh(self.fc2(one).mean(-1, keepdim=True) + one + state)
        return self.fc2(state)


@pytest.mark.parametrize("kind", ["layer", "cell"])
@pytest.mark.parametrize(("samples", "positions"), [(5, 3), (4, 4), (2, 6), (1, 3)])
def test_the_second_dimension_is_taken_where_it_tells_of_more_layers(samples: int, positions: int, kind: str) -> None:
    torch.manual_seed(0)
    model = TimeFirst(kind).double()
    plain, ids = copy.deepcopy(model), torch.randint(11, (positions, samples))
    labels = torch.randint(CLASSES, (samples,))
    weights = torch.ones(samples, dtype=torch.float64).index_fill(0, torch.tensor(0), 30)

    def share(model: nn.Module, n: int) -> Tensor:
        return weights[n] * F.cross_entropy(model(ids[:, n : n + 1]), labels[n : n + 1])

    preconditioner = FNGDPreconditioner(model, strict=True, exclude_modules=["lstm"])
    (weights * F.cross_entropy(model(ids), labels, reduction="none")).sum().backward()
    preconditioner.step()
    names = {name for name, _ in model.named_parameters()}
    modules = ["embedding", "fc1", "fc2"]
    wanted, _ = Clipping().gradients([uses_of(plain, modules, share, n, names) for n in range(samples)])
    for name, g in wanted.items():
        found = model.get_parameter(name).grad
        torch.testing.assert_close(found, g.view_as(found), rtol=1e-7, atol=1e-10, msg=name)


class Transformer(nn.Module):
    """torch's own, with positions first, and a mask with the batch first: a position less is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Transformer(8, 2, 1, 1, 8, dropout=0.0)

    def forward(self, source: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = self.both(source, target, src_key_padding_mask=mask)
        return y


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_the_second_dimension_is_tried_where_the_first_one_fails() -> None:
    torch.manual_seed(0)
    model = Transformer().double()
    plain = copy.deepcopy(model)
    source, target = torch.randn(7, 5, 8).double(), torch.randn(6, 5, 8).double()
    target[:, 2] *= 30
    mask = torch.zeros(5, 7, dtype=torch.bool)
    preconditioner = FNGDPreconditioner(
        model, sharing="never", damping=DAMPING, strict=True, exclude_modules=r".*attn(\.out_proj)?"
    )
    weights = torch.tensor([1.0, 1, 9, 1, 1], dtype=torch.float64)

    def alone(model: nn.Module, n: int) -> Tensor:
        return weights[n] * model(source[:, n : n + 1], target[:, n : n + 1], mask[n : n + 1]).sin().sum()

    (model(source, target, mask).sin().sum((0, 2)) * weights).mean().backward()
    preconditioner.step()
    layers = [layer.name for layer in preconditioner.layers]
    assert len(layers) == 4
    for name in layers:
        own = list(plain.get_submodule(name).parameters())
        p = Dense(per_sample_gradients(plain, own, alone, 5), DAMPING).p
        found = torch.cat([q.grad.flatten() for q in model.get_submodule(name).parameters()])
        torch.testing.assert_close(found, p.flatten(), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("batch_dim", [None, 0])
def test_where_no_probe_can_run_an_argument_tells_what_sizes_do_not(batch_dim: int | None) -> None:
    class Closed(Attention):
        def forward(self, x: Tensor) -> Tensor:
            assert self.training
            return super().forward(x)

    model = Closed().double()
    preconditioner = FNGDPreconditioner(model, batch_dim=batch_dim)
    x, y = batch(4, 4, "batch first")
    F.cross_entropy(model(x), y).backward()
    preconditioner.step()
    assert set(preconditioner.coverage().missed.values()) == ({AMBIGUOUS} if batch_dim is None else set())


def test_an_argument_says_that_positions_come_first_where_nothing_else_can() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES)).double()
    plain = copy.deepcopy(model)
    preconditioner = FNGDPreconditioner(model, batch_dim=1, layer_types=EVERY_TYPE)
    x = torch.randn(4, 5, WIDTH, dtype=torch.float64)
    x[:, 2] *= 10
    (model(x).square().sum((0, 2)).mean()).backward()

    def alone(model: nn.Module, n: int) -> Tensor:
        return model(x[:, n : n + 1]).square().sum() / 5

    trained = {name for name, _ in plain.named_parameters()}
    found, _ = Clipping().gradients([uses_of(plain, ["0", "2"], alone, n, trained) for n in range(5)])
    for name, g in found.items():
        torch.testing.assert_close(model.get_parameter(name).grad.flatten(), g)
    preconditioner.step()
