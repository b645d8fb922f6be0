"""Muon by singular values, on whole matrices and on blocks of rows, and beside torch's own."""

import math

import pytest
import torch
from torch import Tensor

from hf_fngd.updates import muon, orthogonal
from hf_fngd.updates.orthogonal import block_shape, orthogonalize, orthogonalize_blocks
from tests.updates.rules import (
    MATRICES,
    STEPS,
    apply,
    assert_equal,
    gradients,
    ours,
    polynomial,
    start,
    theirs,
)


@pytest.mark.parametrize("shape", MATRICES)
def test_orthogonalize_acts_on_the_singular_values(shape: tuple[int, int]) -> None:
    matrices = torch.stack([gradients([shape], step)[0] for step in range(3)])
    found = orthogonalize(matrices)
    assert found.shape == matrices.shape
    for matrix, result in zip(matrices, found, strict=True):
        torch.testing.assert_close(result, polynomial(matrix), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("rule", ["muon", "block_muon"])
@pytest.mark.parametrize("shape", [(3, 4), (3, 7), (2, 1)])
def test_fewer_steps(shape: tuple[int, int], rule: str, steps: int) -> None:
    params, g = [torch.zeros(shape, dtype=torch.float64)], gradients([shape], 0)
    apply(rule, params, g, [1], ns_steps=steps, momentum=0.0)
    torch.testing.assert_close(params[0], -0.05 * 0.2 * max(shape) ** 0.5 * polynomial(g[0], steps))


def test_orthogonalize_brings_singular_values_near_one() -> None:
    matrices = torch.stack([gradients([(16, 24)], step)[0] for step in range(8)])
    s = torch.linalg.svdvals(orthogonalize(matrices))
    assert s.min() > 0.3
    assert s.max() < 1.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smallest", [1, 1e-3, 1e-6, 1e-9, 0])
def test_iterating_on_gram_matrices_is_the_same(smallest: float, dtype: torch.dtype) -> None:
    """For any spectrum; 0 stands for a matrix of rank 2."""
    q, r = (torch.linalg.qr(gradients([shape], 0)[0])[0] for shape in ((16, 16), (48, 16)))
    spectrum = torch.logspace(0, math.log10(smallest), 16).double() if smallest else torch.arange(16) < 2
    matrix = (q * spectrum) @ r.T
    matrix /= matrix.norm()
    expected = orthogonal._on_matrices(matrix[None], 5)
    found = orthogonal._on_gram_matrices(matrix[None].to(dtype), 5).double()
    assert (found - expected).norm() / expected.norm() < (1e-11 if dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize("steps", [9, 10, 12, 100])
@pytest.mark.parametrize("shape", [(32, 128), (4, 128)])
def test_many_iterations_on_gram_matrices_stay_bounded(shape: tuple[int, int], steps: int) -> None:
    """Of a small batch's gradient, whose rank is 4."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(shape[0], 4, generator=generator), torch.randn(4, shape[1], generator=generator)
    found = torch.linalg.svdvals(orthogonalize((left @ right)[None], steps))
    assert (found[0, :4] > 0.6).all()
    assert found.max() < 1.3
    double = orthogonalize((left @ right).double()[None], steps)
    expected = orthogonal._on_matrices((left @ right).double()[None], steps)
    assert (double - expected).norm() / expected.norm() < 1e-6


def test_wide_matrices_alone_are_iterated_on_their_gram_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    monkeypatch.setattr(orthogonal, "_on_gram_matrices", lambda x, _: shapes.append(tuple(x.shape)) or x)
    for shape in ((4, 8), (8, 4), (4, 7), (4, 4), (7, 4)):
        orthogonalize(torch.ones(1, *shape))
    assert shapes == [(1, 4, 8), (1, 4, 8)]
    assert not orthogonal.prefers_gram(4, 16, torch.bfloat16)


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_orthogonalize_does_not_see_the_scale(scale: float) -> None:
    matrix = gradients([(4, 6)], 0)[0].float()[None]
    torch.testing.assert_close(orthogonalize(scale * matrix), orthogonalize(matrix), rtol=1e-4, atol=1e-4)


def test_orthogonalize_of_nothing_is_nothing() -> None:
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_orthogonalize_widens_half_precision(dtype: torch.dtype) -> None:
    matrix = gradients([(4, 6)], 0)[0].to(dtype)[None]
    torch.testing.assert_close(
        orthogonalize(matrix), polynomial(matrix[0].double())[None].float(), rtol=1e-4, atol=1e-4
    )


def test_muon_is_nesterov_momentum_through_the_singular_values() -> None:
    params, buffers = start(MATRICES), [torch.zeros(shape, dtype=torch.float64) for shape in MATRICES]
    for step in range(STEPS):
        for p, buffer, g in zip(params, buffers, gradients(MATRICES, step), strict=True):
            buffer.mul_(0.9).add_(0.1 * g)
            direction = polynomial(0.9 * buffer + 0.1 * g)
            p.mul_(1 - 0.05 * 0.1).sub_(0.05 * 0.2 * max(p.shape) ** 0.5 * direction)
    assert_equal(ours("muon", MATRICES), params, rtol=1e-8, atol=1e-9)


def test_muon_takes_as_many_matrices_together_as_the_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    together: list[int] = []

    def count(matrices: Tensor, *options: int) -> Tensor:
        together.append(len(matrices))
        return orthogonalize_blocks(matrices, *options)

    expected = ours("muon", [(4, 6)] * 5)
    monkeypatch.setattr(muon, "orthogonalize_blocks", count)
    monkeypatch.setattr(muon, "_MUON_BYTES_ON_CPU", 2 * 4 * 6 * 8)
    torch.testing.assert_close(ours("muon", [(4, 6)] * 5), expected)
    assert together == [2, 2, 1] * STEPS


def test_muon_is_torchs_muon_up_to_its_bfloat16() -> None:
    def make(params: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Muon(params, lr=0.05, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")

    moved = ours("muon", MATRICES)
    for found, expected, first in zip(moved, theirs(make, MATRICES), start(MATRICES), strict=True):
        assert torch.linalg.norm(found - expected) < 0.02 * torch.linalg.norm(found - first)


@pytest.mark.parametrize("rule", ["muon", "block_muon"])
@pytest.mark.parametrize("shape", [(32, 32), (32, 256), (256, 32)])
def test_the_root_mean_square_of_muons_update_is_a_fifth_of_lr(shape: tuple[int, int], rule: str) -> None:
    params = [torch.zeros(shape, dtype=torch.float64)]
    apply(rule, params, gradients([shape], 0), [1], weight_decay=0.0, block_size=16)
    assert float(params[0].square().mean().sqrt()) == pytest.approx(0.2 * 0.05, rel=0.25)


# Muon on blocks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "size", "heights"), [(12, 4, 3 * [4]), (10, 4, [4, 4, 2]), (9, 8, [5, 4]), (3, 8, [3])]
)
def test_rows_are_split_into_few_equal_blocks(rows: int, size: int, heights: list[int]) -> None:
    count, height = block_shape(rows, size)
    assert [min(height, rows - n * height) for n in range(count)] == heights


@pytest.mark.parametrize("shape", [(12, 6), (10, 6), (6, 10), (9, 2), (7, 7), (3, 5), (1, 4)])
@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_block_muon_is_muon_on_blocks_of_rows(shape: tuple[int, int], size: int) -> None:
    params, buffers = start([shape] * 2), [torch.zeros(shape, dtype=torch.float64) for _ in range(2)]
    _, height = block_shape(shape[0], size)
    for step in range(STEPS):
        for p, buffer, g in zip(params, buffers, gradients([shape] * 2, step), strict=True):
            buffer.mul_(0.9).add_(0.1 * g)
            blocks = [polynomial(block) for block in (0.9 * buffer + 0.1 * g).split(height)]
            p.mul_(1 - 0.05 * 0.1).sub_(0.05 * 0.2 * max(height, shape[1]) ** 0.5 * torch.cat(blocks))
    assert_equal(ours("block_muon", [shape] * 2, block_size=size), params, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("block_size", [4, 16, 64, None])
@pytest.mark.parametrize("shape", [(32, 32), (128, 32), (32, 128), (96, 384)])
def test_an_update_is_as_large_for_any_shape_block_and_momentum(
    shape: tuple[int, int], block_size: int | None, momentum: float
) -> None:
    params, state, rule = start([shape]), (), "block_muon" if block_size else "muon"
    for step in range(10):
        before = params[0].clone()
        settings = {"momentum": momentum, "block_size": block_size, "weight_decay": 0.0, "lr": 1.0}
        state = apply(rule, params, gradients([shape], step), [step + 1], *state, **settings)
        assert 0.13 < float((params[0] - before).square().mean().sqrt()) < 0.23
