"""Sketched: Gram matrices of projected features, weighted sums of whole ones."""

import pytest
import torch
from torch import Tensor

from hf_fngd import FNGDPreconditioner
from hf_fngd.coefficients import coefficients
from hf_fngd.persample import gram
from hf_fngd.sharing import SketchedSharing
from tests.nets import LAYER_NAMES, LAYERS, data, fresh_weights, gradient, loss, net, relative_error, trained
from tests.reference import per_sample_gradients

BUDGET = 2**20


def layer(n: int, t: int, i: int, o: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs that have a mean, as those behind a ReLU, and output gradients."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, t, i, generator=generator, dtype=torch.float64).relu()
    return a.to(dtype), torch.randn(n, t, o, generator=generator, dtype=torch.float64).to(dtype)


def grams(policy: SketchedSharing, a: Tensor, g: Tensor, bias: bool = True) -> tuple[Tensor, Tensor]:
    """K of the projected and of the whole gradients."""
    return gram(*policy.reduce(a, g), bias=bias, memory_budget=BUDGET), gram(a, g, bias=bias, memory_budget=BUDGET)


@pytest.mark.parametrize(
    ("n", "i", "o", "expected"),
    [
        (128, 512, 512, (64, 64)),
        (64, 512, 2048, (48, 48)),
        (64, 512, 10, (208, 10)),
        (64, 10, 512, (10, 208)),
        (128, 512, 10, (416, 10)),
        (128, 64, 4, (64, 4)),  # too few entries to leave any out
        (1024, 4096, 8, (4096, 8)),
        (1, 512, 512, (32, 32)),
        (7, 5, 7, (5, 7)),
    ],
)
def test_a_projection_has_thirty_two_entries_a_sample(n: int, i: int, o: int, expected: tuple[int, int]) -> None:
    assert SketchedSharing().sizes(n, i, o) == expected
    a, g = SketchedSharing().reduce(torch.zeros(n, 1, i), torch.zeros(n, 1, o))
    assert (a.shape[-1], g.shape[-1]) == expected


@pytest.mark.parametrize("t", [1, 6])
def test_layers_with_few_features_are_exact(t: int) -> None:
    a, g = layer(16, t, 8, 9)
    reduced = SketchedSharing().reduce(a, g)
    assert reduced[0] is a
    assert reduced[1] is g


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("t", [1, 6])
@pytest.mark.parametrize(("i", "o"), [(512, 512), (500, 10), (10, 500)])
def test_the_gram_matrix_comes_closer_with_more_features(i: int, o: int, t: int, bias: bool) -> None:
    a, g = layer(32, t, i, o)
    rough, close = (relative_error(*grams(SketchedSharing(oversampling), a, g, bias)) for oversampling in (16, 400))
    assert rough < 0.6
    assert close < 0.6 * rough


def test_the_bias_keeps_its_share() -> None:
    a, g = layer(32, 3, 512, 512)
    found, expected = grams(SketchedSharing(400), 1e-3 * a, g)  # next to nothing but the bias
    assert float(found.trace() / expected.trace()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_weights_are_close_to_those_of_whole_gradients(dtype: torch.dtype) -> None:
    a, g = layer(64, 4, 512, 512, dtype)
    # Samples of different sizes, some of which share a direction.
    g[:8] = g[:1] + 0.1 * g[:8]
    g *= torch.linspace(0.2, 2, 64, dtype=dtype)[:, None, None]
    found, expected = (coefficients(k, 0.01).w for k in grams(SketchedSharing(), a, g))
    assert found.dtype == dtype
    assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > 0.9


@pytest.mark.parametrize(("layer_type", "bias"), LAYERS)
def test_the_weighted_sum_has_whole_gradients(layer_type: str, bias: str) -> None:
    model, (x, y) = net(layer_type=layer_type, bias=bias, width=400), data(7, 3)
    preconditioner = FNGDPreconditioner(model, damping=0.01, sharing="sketched")
    loss(model, x, y).backward()
    weights, found = fresh_weights(preconditioner), [gradient(model.get_submodule(name)) for name in LAYER_NAMES]
    model.zero_grad()
    model.eval()
    for place, name in enumerate(LAYER_NAMES):
        u = per_sample_gradients(
            model, trained(model.get_submodule(name)), lambda m, n: loss(m, x[n : n + 1], y[n : n + 1]), len(x)
        )
        assert relative_error(found[place], u @ weights[place] / len(x)) < 1e-9
    assert float(weights.std(dim=1).min()) > 0.01  # of which none is plain averaging


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**16])
def test_the_scale_of_the_loss_does_not_matter(scale: float) -> None:
    found = []
    for factor in (1.0, scale):
        model, (x, y) = net(width=400, dtype=torch.float32), data(7, 3, dtype=torch.float32)
        preconditioner = FNGDPreconditioner(model, damping=0.01, sharing="sketched")
        (factor * loss(model, x, y)).backward()
        found.append(fresh_weights(preconditioner))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_all_processes_and_runs_project_alike_and_draw_no_random_numbers() -> None:
    a, g = layer(16, 2, 300, 300)
    first = SketchedSharing().reduce(a, g)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    second = SketchedSharing().reduce(a, g)
    assert torch.equal(torch.get_rng_state(), before)
    for found, expected in zip(second, first, strict=True):
        assert torch.equal(found, expected)


def test_inputs_and_outputs_are_projected_apart() -> None:
    a, _ = layer(16, 2, 300, 300)
    left, right = SketchedSharing().reduce(a, a)
    assert relative_error(left, right) > 0.5


@pytest.mark.parametrize("oversampling", [0, -1])
def test_a_projection_needs_entries(oversampling: int) -> None:
    with pytest.raises(ValueError, match=r"oversampling=.*at least 1"):
        SketchedSharing(oversampling)
