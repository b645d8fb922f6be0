"""Properties that hold for any shape, dtype, batch and damping: Gram matrices, weights, and one whole layer."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_fngd import FNGDPreconditioner
from hf_fngd.weights.algebra import weighted_bias_sum, weighted_sum
from hf_fngd.weights.gram import gram, normalize
from hf_fngd.weights.solve import coefficients, damping_from_gradient, natural_step
from tests.nets import LAYERS, layer
from tests.reference import Dense, gram_from_layer, per_sample_gradients

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

sizes = st.integers(1, 6)
features = st.integers(1, 7)
dampings = st.floats(-4, 3).map(lambda exponent: 10.0**exponent)
seeds = st.integers(0, 2**32)
budgets = st.integers(1, 4000)


@dataclass(frozen=True)
class Layer:
    """Inputs ``[N, T, i]`` and output gradients ``[N, T, o]`` of one layer, exact in ``dtype``."""

    a: Tensor
    g: Tensor


@st.composite
def layers(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES, low: int = -6, high: int = 4) -> Layer:
    """Samples of any likeness: independent, with a common part, duplicates, or without a gradient."""
    n, t, i, o = draw(sizes), draw(sizes), draw(features), draw(features)
    dtype, generator = draw(st.sampled_from(dtypes)), torch.Generator().manual_seed(draw(seeds))
    likeness = draw(st.sampled_from(["independent", "common", "duplicates", "zeros"]))
    a, g = (torch.randn(n, t, f, generator=generator, dtype=torch.float64) for f in (i, o))
    if likeness == "common":
        a, g = a + 3, g + 3
    elif likeness == "duplicates":
        order = torch.randint((n + 1) // 2, (n,), generator=generator)
        a, g = a[order], g[order]
    elif likeness == "zeros":
        g[: n // 2] = 0
    return Layer(a.to(dtype), (g * 2.0 ** draw(st.integers(low, high))).to(dtype))


def rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def per_sample(of: Layer, bias: bool) -> Tensor:
    """U ``[P, N]`` in float64."""
    a, g = of.a.double(), of.g.double()
    columns = []
    for n in range(len(a)):
        h = sum(torch.outer(g[n, t], a[n, t]) for t in range(a.shape[1])).flatten()
        columns.append(len(a) * (torch.cat([h, g[n].sum(dim=0)]) if bias else h))
    return torch.stack(columns, dim=1)


# Gram matrices and sums ----------------------------------------------------------------------------------


@given(layers(), st.booleans(), budgets, st.sampled_from(["ghost", "formed", None]))
def test_every_route_yields_the_dense_gram(of: Layer, bias: bool, budget: int, route: str | None) -> None:
    found = gram(of.a, of.g, bias=bias, memory_budget=budget, route=route)
    expected = gram_from_layer(of.a.double(), of.g.double(), bias)
    # What the terms of an entry add up to, where they do not cancel.
    terms = gram_from_layer(of.a.double().abs(), of.g.double().abs(), bias).max()
    assert (found.double() - expected).abs().max() <= 100 * rounding(found.dtype) * terms


@given(layers((torch.float64, torch.float32)), seeds)
def test_sums_are_linear_in_the_weights(of: Layer, seed: int) -> None:
    w = torch.randn(len(of.a), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u = per_sample(of, bias=True)
    expected = (u @ w / len(w)).split([of.g.shape[-1] * of.a.shape[-1], of.g.shape[-1]])
    found = weighted_sum(of.a, of.g, w).double().flatten(), weighted_bias_sum(of.g, w).double()
    scale = float((u.norm(dim=0) * w.abs()).sum()) * math.sqrt(of.a.shape[1])
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 100 * rounding(of.a.dtype) * scale


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=8),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_normalizing_is_exact(values: list[float], dtype: torch.dtype) -> None:
    x = torch.tensor(values, dtype=dtype)
    y = normalize(x)
    if not x.any():
        assert not y.any()
        return
    assert 0.5 <= float(y.abs().max()) < 1
    exponent = math.frexp(float(x.abs().max()))[1]
    for before, after in zip(values, y.tolist(), strict=True):
        # Entries that are smaller than the largest by the whole range of the dtype may vanish.
        assert after == math.ldexp(before, -exponent) or abs(after) < torch.finfo(dtype).tiny


# Weights -------------------------------------------------------------------------------------------------


@given(layers((torch.float64,)), dampings)
def test_weights_solve_equation_9(of: Layer, damping: float) -> None:
    exact = Dense(per_sample(of, bias=False), damping)
    found = coefficients(exact.k, damping)
    if not exact.u.any():
        assert torch.equal(found.w, torch.ones_like(found.w))
        assert found.rho.isnan()
        return
    tolerance = 1e-12 * (1 + 1 / damping)
    torch.testing.assert_close(found.w, exact.w, rtol=tolerance, atol=tolerance * float(exact.w.abs().max()))
    assert abs(float(found.w.mean()) - 1) < tolerance
    squared, spread = exact.p.square().sum(), exact.w.square().mean()
    # ||p||^2 may cancel almost to nothing, and rho is its inverse: compared by what it is made of.
    assert abs(float(torch.linalg.matrix_norm(exact.k) / found.rho - squared)) < 10 * tolerance * float(
        spread * exact.k.diagonal().max() * len(found.w)
    )
    assert float(found.rho) * float(squared) > 0
    lam = damping_from_gradient(exact.rho, squared, damping)
    torch.testing.assert_close(lam, exact.lam, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        natural_step(exact.rho, spread, squared, damping), 1 / exact.lam_prime, rtol=1e-6, atol=0
    )


@given(layers((torch.float64,)), st.sampled_from([1e-8, 1.0, 1e8]), dampings)
def test_weights_do_not_see_the_scale_of_the_gradient(of: Layer, scale: float, damping: float) -> None:
    k = Dense(per_sample(of, bias=False), damping).k
    found, expected = coefficients(k * scale**2, damping), coefficients(k, damping)
    tolerance = 1e-12 * (1 + 1 / damping) * float(expected.w.abs().max())
    torch.testing.assert_close(found.w, expected.w, rtol=0, atol=tolerance)


@given(layers((torch.float64,)), seeds, dampings)
def test_weights_follow_their_samples(of: Layer, seed: int, damping: float) -> None:
    k = Dense(per_sample(of, bias=False), damping).k
    order = torch.randperm(len(k), generator=torch.Generator().manual_seed(seed))
    expected = coefficients(k, damping).w[order]
    tolerance = 1e-12 * (1 + 1 / damping) * float(expected.abs().max())
    torch.testing.assert_close(coefficients(k[order][:, order], damping).w, expected, rtol=0, atol=tolerance)


@given(layers((torch.float64,)))
def test_averaging_is_the_limit(of: Layer) -> None:
    k = Dense(per_sample(of, bias=False), 1.0).k
    torch.testing.assert_close(coefficients(k, 1e12).w, torch.ones_like(k[0]), rtol=0, atol=1e-11)


# One whole layer -----------------------------------------------------------------------------------------

# Of what the terms of the weighted sum add up to where they do not cancel.
WHOLE = {torch.float64: 1e-11, torch.float32: 3e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


@given(
    layers(),
    st.sampled_from(LAYERS),
    st.floats(-2, 3).map(lambda exponent: 10.0**exponent),
    budgets,
)
def test_a_layer_finds_the_natural_gradient(of: Layer, kind: tuple[str, str], damping: float, budget: int) -> None:
    dtype, samples = of.a.dtype, len(of.a)
    module = layer(*kind, of.a.shape[-1], of.g.shape[-1]).to(dtype)
    plain = copy.deepcopy(module).double()
    trained = [p for p in plain.parameters() if p.requires_grad]

    def alone(model: nn.Module, n: int) -> Tensor:
        return samples * (model(of.a[n : n + 1].double()) * of.g[n : n + 1].double()).sum()

    exact = Dense(per_sample_gradients(plain, trained, alone, samples), damping)
    engine = FNGDPreconditioner(module, damping=damping, sharing="never", memory_budget=budget)
    if of.a.shape[1] == samples > 1:  # which leaves open which dimension is the batch's: another batch tells
        module(of.a[:1].expand(samples + 1, -1, -1)).sum().backward()
        engine.step()
        module.zero_grad()
    # Linear in the output: the output gradient is g, without a rounding.
    module(of.a).backward(of.g)
    found = torch.cat([p.grad.double().flatten() for p in module.parameters() if p.requires_grad])
    expected = exact.p if exact.u.any() else exact.u.mean(dim=1)
    size = float((exact.u.norm(dim=0) * exact.w.abs()).mean()) if exact.u.any() else 0.0
    terms = size * math.sqrt(of.a.shape[1])
    assert (found - expected).norm() <= WHOLE[dtype] * terms + torch.finfo(dtype).tiny
    engine.step()
    assert engine.coverage().missed == {}
    assert torch.isfinite(engine.policy.spread).all()
