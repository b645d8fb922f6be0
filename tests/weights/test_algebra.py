"""Gram matrices by every route, weighted sums, norms, and the exactness of `normalize`."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_fngd.layers.linear import LinearKernel
from hf_fngd.weights.algebra import accumulation_dtype, weighted_bias_sum, weighted_factors
from hf_fngd.weights.gram import Route, cheaper_route, gram, normalize
from tests.reference import gram_from_layer
from tests.steps import Allocations
from tests.weights.samples import Layer, budgets, layers, seeds

ROUTES = ["ghost", "formed", None]


def rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def layer(n: int, t: int, i: int, o: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + 10 * t + 100 * i + 1000 * o)
    return tuple(torch.randn(n, t, f, generator=generator, dtype=torch.float64) for f in (i, o))


# Gram matrices ---------------------------------------------------------------------------------------------


@given(layers(), st.booleans(), budgets, st.sampled_from(ROUTES))
def test_every_route_yields_the_dense_gram(of: Layer, bias: bool, budget: int, route: Route | None) -> None:
    found = gram(of.a, of.g, bias=bias, memory_budget=budget, route=route)
    assert found.dtype == accumulation_dtype(of.a.dtype)
    assert rounding(found.dtype) <= rounding(torch.float32)
    expected = gram_from_layer(of.a.double(), of.g.double(), bias)
    # What the terms of an entry add up to, where they do not cancel.
    terms = gram_from_layer(of.a.double().abs(), of.g.double().abs(), bias).max()
    assert (found.double() - expected).abs().max() <= 100 * rounding(found.dtype) * terms


@pytest.mark.parametrize("budget", [1, 2**12, 2**14])
@pytest.mark.parametrize("route", ["ghost", "formed"])
def test_temporary_memory_stays_within_the_budget_and_a_larger_one_is_used(route: Route, budget: int) -> None:
    n, t, i, o, item = 16, 8, 4, 128, 8
    a, g = layer(n, t, i, o)
    smallest_block = {"ghost": t * n * t * item, "formed": n * i * item}[route]
    largest = []
    for allowed in (budget, 2**24):
        with Allocations(a, g) as allocations:
            gram(a, g, bias=False, memory_budget=allowed, route=route)
        largest.append(allocations.largest)
    held = 2 if route == "ghost" else 1  # two products at a time
    assert held * largest[0] <= max(budget, held * smallest_block, held * n * n * item)
    assert largest[0] < largest[1]


def test_on_a_cpu_h_is_formed_in_slices_even_where_the_budget_does_not_ask_for_it() -> None:
    a, g = layer(8, 1, 128, 512)
    with Allocations(a, g) as allocations:
        found = gram(a, g, bias=True, memory_budget=2**28, route="formed")
    assert allocations.largest <= 2**21 < 8 * 128 * 512 * 8
    torch.testing.assert_close(found, gram(a, g, bias=True, memory_budget=2**28, route="ghost"))


@pytest.mark.parametrize(("n", "t"), [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("route", ROUTES)
def test_an_empty_batch_has_an_empty_or_zero_gram(n: int, t: int, route: Route | None) -> None:
    k = gram(torch.zeros(n, t, 2), torch.zeros(n, t, 3), bias=True, memory_budget=1, route=route)
    assert torch.equal(k, torch.zeros(n, n))


@pytest.mark.parametrize(
    ("n", "t", "i", "o", "route"),
    [
        # Measured crossings on a CPU (N = 64): T near 18, 27 and 36.
        (64, 10, 256, 256, "ghost"),
        (64, 30, 256, 256, "formed"),
        (64, 20, 512, 512, "ghost"),
        (64, 40, 512, 512, "formed"),
        (64, 25, 512, 2048, "ghost"),
        (64, 60, 512, 2048, "formed"),
        (64, 1, 4, 4, "ghost"),
        (64, 200, 4, 4, "formed"),
    ],
)
def test_the_cheaper_route_is_the_one_measured(n: int, t: int, i: int, o: int, route: str) -> None:
    assert cheaper_route(n, t, i, o) == route


# Sums and norms --------------------------------------------------------------------------------------------


@given(layers(), seeds, st.booleans())
def test_sums_are_linear_in_the_weights(of: Layer, seed: int, plain: bool) -> None:
    w = torch.randn(len(of.a), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    w = None if plain else w
    own = None if w is None else w.to(of.g.dtype)
    a, g = of.a.flatten(0, 1), of.g.flatten(0, 1)
    weighted_a, weighted_g = weighted_factors(a, g, own)
    found = weighted_g.t() @ weighted_a, weighted_bias_sum(g, own)
    w = torch.ones(len(of.a), dtype=torch.float64) if w is None else w
    u = of.per_sample(bias=True)
    expected = (u @ w / len(w)).split([found[0].numel(), found[1].numel()])
    scale = float((u.norm(dim=0) * w.abs()).sum()) * math.sqrt(of.a.shape[1])
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == of.a.dtype
        smallest = torch.finfo(one.dtype).tiny * other.numel()
        assert (one.double().flatten() - other).norm() <= 100 * rounding(one.dtype) * scale + smallest


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("t", [1, 5])
def test_sample_norms_are_those_of_h_for_single_positions_and_bound_them_for_many(t: int, bias: bool) -> None:
    a, g = layer(6, t, 4, 3)
    found = LinearKernel().norms(a, g.flatten(0, 1), bias)
    a = torch.cat([a, torch.ones_like(a[..., :1])], dim=-1) if bias else a
    exact = torch.linalg.matrix_norm(g.transpose(1, 2) @ a)
    if t == 1:
        torch.testing.assert_close(found, exact)
    assert (found >= exact * (1 - 1e-12)).all()


# Normalizing -----------------------------------------------------------------------------------------------

WIDTHS = {torch.float16: 16, torch.float32: 32, torch.float64: 64}


@st.composite
def vectors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(list(WIDTHS)))
    entries = st.floats(allow_nan=False, allow_infinity=False, width=WIDTHS[dtype])
    return torch.tensor(draw(st.lists(entries, max_size=8)), dtype=torch.float64).to(dtype)


@given(vectors())
def test_normalizing_divides_by_an_exact_power_of_two(x: Tensor) -> None:
    y = normalize(x)
    assert (y.dtype, y.shape) == (accumulation_dtype(x.dtype), x.shape)
    if not x.any():
        assert not y.any()
        return
    assert 0.5 <= float(y.abs().max()) < 1
    exponent = math.frexp(float(x.double().abs().max()))[1]
    for before, after in zip(x.tolist(), y.tolist(), strict=True):
        # Entries that are smaller than the largest by the whole range of the dtype may vanish.
        assert after == math.ldexp(before, -exponent) or abs(after) < torch.finfo(y.dtype).tiny


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_normalize_does_not_hide_what_is_not_finite(value: float) -> None:
    assert not torch.isfinite(normalize(torch.tensor([1.0, value]))).all()
