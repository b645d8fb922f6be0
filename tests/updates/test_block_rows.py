"""How many rows the blocks of `block_muon` have where nobody says so, and how FNGD finds the positions that decide."""

import logging
from collections.abc import Callable
from math import ceil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_fngd import FNGD
from hf_fngd.updates.block_muon import block_rows
from hf_fngd.updates.orthogonal import count_operations


@pytest.mark.parametrize(
    ("shape", "size", "height"),
    [
        ((64, 64), None, 32),
        ((128, 512), None, 32),
        ((512, 512), None, 128),
        ((2048, 512), None, 128),
        ((512, 2048), None, 128),
        ((600, 600), None, 150),
        ((24, 900), None, 24),
        ((100, 512), None, 25),  # as few equal blocks as have 32 rows at most
        ((512, 512), 32, 32),
        ((512, 512), 1000, 512),
    ],
)
def test_where_positions_are_few_a_block_has_a_quarter_of_the_shorter_side(
    shape: tuple[int, int], size: int | None, height: int
) -> None:
    assert block_rows(*shape, size) == block_rows(*shape, size, 10) == height


def price(rows: int, columns: int, count: int, positions: int) -> float:
    """What orthogonalizing so many blocks takes of the layer's forward and backward."""
    return count * count_operations(ceil(rows / count), columns, 5, torch.float32) / (6 * positions * rows * columns)


@pytest.mark.parametrize("shape", [(96, 96), (384, 96), (96, 384), (512, 512), (2048, 512), (1000, 700), (33, 65)])
@pytest.mark.parametrize("positions", [1, 500, 1000, 4000, 8000, 16000, 10**9])
def test_blocks_are_as_few_as_a_quarter_of_forward_and_backward_pays_for(
    shape: tuple[int, int], positions: int
) -> None:
    rows, columns = shape
    most = ceil(rows / max(32, min(shape) // 4))
    heights = [ceil(rows / count) for count in range(1, most) if price(rows, columns, count, positions) <= 1 / 4]
    assert block_rows(rows, columns, None, positions) == max([*heights, ceil(rows / most)])


def test_examples() -> None:
    """What `docs/results.md` tells of: a ViT, GPT-2, translation, and the paper's width."""
    assert [block_rows(*shape, None, 2170) for shape in ((96, 96), (384, 96), (96, 384))] == [96, 384, 96]
    assert [block_rows(*shape, None, 896) for shape in ((128, 128), (128, 512), (512, 128))] == [64, 64, 64]
    assert [block_rows(*shape, None, 960) for shape in ((64, 64), (256, 64), (64, 256))] == [32, 256, 64]
    assert [block_rows(*shape, None, 1024) for shape in ((512, 512), (2048, 512), (512, 2048))] == [128, 128, 171]
    assert block_rows(768, 768, None, 10**6) == 768
    assert block_rows(768, 768, 32, 10**6) == 32  # the user's


# Positions ---------------------------------------------------------------------------------------------------


class Images(nn.Module):
    """A convolution of stride 2 to 4 x 4 positions, a transposed one of stride 2 from these, and their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x)).square().mean()


class Sentences(nn.Module):
    """Two layers of 5 positions a sample and one of a single position; half of the weights are the latter's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.pooler = nn.Linear(8, 4), Conv1D(4, 4), nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.pooler(self.second(self.first(x)).mean(1)).square().mean()


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)), (10, 8), 10),
    "convolutions": (Images, (10, 6, 8, 8), 160),
    "several lengths": (Sentences, (10, 5, 8), 30),
}


def train(model: nn.Module, optimizer: FNGD, *batches: Tensor) -> int | None:
    """One step of some micro-batches; what the rule then knows."""
    for x in batches:
        model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return positions(optimizer)


def positions(optimizer: FNGD) -> int | None:
    found = {group["positions"] for group in optimizer.param_groups if "positions" in group}
    assert len(found) <= 1
    return next(iter(found), None)


def made(case: str = "linear", **settings: Any) -> tuple[nn.Module, FNGD, Tensor, int]:
    torch.manual_seed(0)
    make, shape, expected = CASES[case]
    model = make()
    return model, FNGD(model, **({"update": "block_muon"} | settings)), torch.randn(shape), expected


@pytest.mark.parametrize("sharing", ["clipped", "uniform", "never"])
@pytest.mark.parametrize("case", list(CASES))
def test_the_first_step_shows_how_many_positions_a_layer_sees(case: str, sharing: str) -> None:
    model, optimizer, x, expected = made(case, sharing=sharing)
    assert positions(optimizer) == 0
    assert train(model, optimizer, x) == expected
    assert train(model, optimizer, x[:2]) == expected  # it stays


def test_they_are_those_of_all_micro_batches() -> None:
    model, optimizer, x, expected = made()
    assert train(model, optimizer, x, x, x[:3]) == 2 * expected + 3


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # raised by the compiler itself
def test_a_compiled_model_has_the_same() -> None:
    model, optimizer, x, expected = made("several lengths")
    assert train(torch.compile(model, backend="aot_eager"), optimizer, x) == expected


def test_steps_that_are_not_taken_tell_nothing() -> None:
    model, optimizer, x, expected = made()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # as Accelerate does under FSDP2, to have a state to load into
    optimizer.step()
    assert positions(optimizer) == 0
    assert train(model, optimizer, x * torch.nan) == 0
    assert optimizer.skipped == 1
    assert train(model, optimizer, x) == expected


def test_a_checkpoint_keeps_them() -> None:
    model, optimizer, x, expected = made()
    train(model, optimizer, x)
    resumed_model, resumed, _, _ = made()
    resumed.load_state_dict(optimizer.state_dict())
    assert positions(resumed) == expected
    assert train(resumed_model, resumed, x[:2]) == expected


def test_only_blocks_of_no_given_size_ask() -> None:
    for settings in ({"block_size": 4}, {"update": "muon"}, {"update": "adam"}):
        model, optimizer, x, _ = made(**settings)
        assert train(model, optimizer, x) is None
    model, optimizer, x, expected = made(update="adam", param_groups=[{"params": ["2"], "update": "block_muon"}])
    assert train(model, optimizer, x) == expected


def test_matrices_that_are_not_weighed_have_the_smallest_blocks() -> None:
    class Attention(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, x, x, need_weights=False)[0]

    model = nn.Sequential(nn.Linear(8, 64), Attention(64, 2, batch_first=True))
    optimizer = FNGD(model, update="block_muon")
    train(model, optimizer, torch.randn(100, 200, 8))
    found = {group["name"]: group.get("positions") for group in optimizer.param_groups}
    assert (found["preconditioned"], found["unweighed"]) == (20000, None)


@pytest.mark.parametrize(("length", "whole"), [(1, False), (2000, True)])
def test_a_large_batch_has_whole_matrices(length: int, whole: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Then blocks are Muon, bit for bit."""

    def trained(update: str) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
        optimizer = FNGD(model, lr=1e-2, update=update)
        for _ in range(3):
            train(model, optimizer, torch.randn(4, length, 64))
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    with caplog.at_level(logging.INFO, logger="hf_fngd"):
        assert torch.equal(trained("muon"), trained("block_muon")) == whole
    told = [record.getMessage() for record in caplog.records if "block_muon" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith(f"At {4 * length} positions a step")
    assert f"orthogonalizes {2 if whole else 0} of 2 matrices whole" in told[0]


def test_the_coverage_report_says_it_as_soon_as_it_is_known() -> None:
    model, optimizer, x, expected = made()
    assert "positions" not in str(optimizer.coverage())
    train(model, optimizer, x)
    assert str(optimizer.coverage()).splitlines()[-1].startswith(f"  At {expected} positions a step")


def test_layers_that_are_unfrozen_are_counted_in() -> None:
    """A head first, which sees a position a sample, then its body, which sees ten."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    model = nn.Sequential(body, nn.Flatten(), nn.Linear(80, 2))
    optimizer, x = FNGD(model, update="block_muon"), torch.randn(7, 10, 8)
    assert train(model, optimizer, x) == 7
    body.requires_grad_(True)
    assert train(model, optimizer, x) == round((7 * 160 + 70 * 128) / (160 + 128))
    assert train(model, optimizer, x[:3]) == 35  # it stays


def test_layers_without_a_gradient_do_not_count() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(100, 100)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Unused()
    assert train(model, FNGD(model, update="block_muon"), torch.randn(7, 10, 8)) == 70
