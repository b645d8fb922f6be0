"""Convolutions: a bias counts in the norm, output_size, and inputs whose samples are not in the first dimension."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fngd import FNGD, FNGDPreconditioner
from hf_fngd.engine.reasons import NOT_ITS_ROWS
from hf_fngd.samples.rows import NOT_THE_BATCH
from tests.steps import relative_error

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    # Raised and ignored by the compiler itself.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


class Pixels(nn.Module):
    """A 1 x 1 convolution with a bias, or with a channel of ones in its place."""

    def __init__(self, ones: bool) -> None:
        super().__init__()
        self.ones = ones
        self.conv, self.fc = nn.Conv2d(1 + ones, 8, 1, bias=not ones), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, torch.ones_like(x)], dim=1) if self.ones else x
        return self.fc(torch.tanh(self.conv(x)).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("pixel", [0.0, 0.01, 0.3])
def test_a_bias_counts_as_a_channel_of_ones(pixel: float) -> None:
    torch.manual_seed(0)
    by_bias, by_ones = Pixels(False).double(), Pixels(True).double()
    with torch.no_grad():
        by_ones.conv.weight[:, 0], by_ones.conv.weight[:, 1] = (
            by_bias.conv.weight[:, 0],
            by_bias.conv.bias[:, None, None],
        )
    by_ones.fc.load_state_dict(by_bias.fc.state_dict())
    x, y = torch.rand(16, 1, 8, 8, dtype=torch.float64), torch.randint(3, (16,))
    x[0] = pixel  # its loss counts a hundred times
    scale = torch.tensor([100.0] + [1.0] * 15)
    for model in (by_bias, by_ones):
        FNGDPreconditioner(model)
        (scale * F.cross_entropy(model(x), y, reduction="none")).mean().backward()  # type: ignore[no-untyped-call]
    ones = by_ones.conv.weight.grad
    assert ones is not None
    assert by_bias.conv.weight.grad is not None
    assert relative_error(by_bias.conv.weight.grad[:, 0], ones[:, 0]) < 1e-12
    assert relative_error(by_bias.conv.bias.grad, ones[:, 1, 0, 0]) < 1e-12


class Hourglass(nn.Module):
    """Two transposed convolutions with an output_size, the first called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 3, 2, 1), nn.ConvTranspose2d(4, 4, 3, 2, 1)
        self.last, self.none = nn.ConvTranspose2d(4, 3, 3, 2, 1), nn.ConvTranspose2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.down(x))
        y = self.up(torch.tanh(self.up(torch.tanh(self.down(x)), [7, 7])), output_size=[14, 14])[:, :, :4, :4] + y
        return self.none(self.last(torch.tanh(y), x.shape), None)  # type: ignore[no-any-return]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("sharing", ["uniform", "clipped"])
def test_an_output_size_is_taken(sharing: str, compiled: bool) -> None:
    torch.manual_seed(0)
    model = Hourglass().double()
    x, scale = torch.randn(5, 3, 8, 8, dtype=torch.float64), torch.tensor([30.0, 1, 1, 1, 1]).view(-1, 1, 1, 1)
    plain = copy.deepcopy(model)
    (scale * plain(x)).square().mean().backward()
    preconditioner = FNGDPreconditioner(model, sharing=sharing)
    ((torch.compile(model, backend="aot_eager") if compiled else model)(x) * scale).square().mean().backward()
    assert not preconditioner.coverage().missed
    for (name, p), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        error = relative_error(p.grad, other.grad)
        assert error < 1e-12 if sharing == "uniform" else error > 0.1, name


def packed(module: nn.Module, tokens: int, **given: Any) -> Tensor:
    torch.manual_seed(tokens)
    positions = torch.arange(tokens).repeat(2, 1) % 6
    return module(input_ids=torch.randint(11, (2, tokens)), position_ids=positions, **given)  # type: ignore[no-any-return]


class Text(nn.Module):
    """A convolution over tokens, 16 channels wide, and one over an image beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv, self.fc = nn.Embedding(11, 16), nn.Conv1d(16, 16, 3, padding=1), nn.Linear(16, 3)
        self.patches = nn.Conv2d(3, 16, 4, 4)

    def forward(self, input_ids: Tensor, position_ids: Tensor, pixels: Tensor | None = None) -> Tensor:
        x = torch.tanh(self.conv(self.table(input_ids).transpose(1, 2))).transpose(1, 2)
        return self.fc(x if pixels is None else x + self.patches(pixels).mean((2, 3))[:, None])  # type: ignore[no-any-return]


@pytest.mark.parametrize("lengths", [(12, 16, 20), (16, 12)])
def test_packed_rows_are_no_rows_of_a_convolution(lengths: tuple[int, ...]) -> None:
    model = Text()
    model.patches.requires_grad_(False)
    optimizer = FNGD(model)
    for tokens in lengths:  # 16 tokens are as many as there are channels
        packed(model, tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.coverage().missed == dict.fromkeys(["conv.weight", "conv.bias"], NOT_ITS_ROWS)


@pytest.mark.parametrize("restart", [False, True])
def test_compiled_convolutions_beside_positions(restart: bool) -> None:
    def gradients(wrap: Callable[[nn.Module], Any]) -> tuple[dict[str, str], list[Tensor | None]]:
        torch.manual_seed(0)
        model, pixels = Text().double(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
        preconditioner = FNGDPreconditioner(model)
        positions = torch.arange(12).repeat(4, 1) % (6 if restart else 99)
        ids = torch.randint(11, (4, 12))
        wrap(model)(input_ids=ids, position_ids=positions, pixels=pixels).square().mean().backward()
        return preconditioner.coverage().missed, [p.grad for p in model.parameters()]

    missed, eager = gradients(lambda model: model)
    missed_compiled, compiled = gradients(lambda model: torch.compile(model, backend="aot_eager"))
    assert (
        set(missed)
        == set(missed_compiled)
        == ({f"{n}.{p}" for n in ("conv", "patches") for p in ("weight", "bias")} if restart else set())
    )
    assert max(map(relative_error, compiled, eager)) < 1e-12


class Height(nn.Module):
    """The samples are the height of one image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, (1, 3)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.conv(x.transpose(0, 1).unsqueeze(0)))[0].mean(2).t())  # type: ignore[no-any-return]


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv1d(6, 8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor, _: Any = None) -> Tensor:
        return self.fc(torch.tanh(self.conv(x.permute(1, 2, 0))).mean(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "shape", "others", "settings"),
    [(Height, (6, 3, 9), (), {}), (TimeFirst, (9, 6, 6), (iter([]),), {"batch_dim": 1})],
    ids=["the height", "told by batch_dim alone"],
)
def test_samples_in_another_dimension_are_not_weighed(
    model: type[nn.Module], shape: tuple[int, ...], others: tuple[Any, ...], settings: dict[str, Any]
) -> None:
    network = model()
    preconditioner = FNGDPreconditioner(network, **settings)
    network(torch.randn(shape), *others).square().mean().backward()
    missed = preconditioner.coverage().missed
    assert [missed["conv.weight"], missed["conv.bias"]] == [NOT_THE_BATCH] * 2


def test_convolutions_that_share_their_weight_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 3, 3))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"not taken: 0\.weight: the weight is tied to another module"):
        FNGD(model)


def test_the_note_forgets_sizes_once_the_probe_has_told() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(288, 3))
    optimizer, x = FNGD(model), torch.randn(4, 3, 8, 8)
    notes = []
    for n in range(3):
        model(torch.where(torch.arange(4).view(-1, 1, 1, 1) == 1, torch.nan, x) if n == 0 else x).sum().backward()
        notes.append(optimizer.coverage().note)
        optimizer.step()
        optimizer.zero_grad()
    assert "by sizes alone" in notes[0]
    assert "by sizes alone" not in notes[2]
