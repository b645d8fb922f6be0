"""w, rho and the paper's step against the dense Fisher matrix, and where the Gram matrix is bad."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_fngd.weights.solve import coefficients, damping_from_gradient, natural_step
from tests.reference import Dense
from tests.weights.samples import Layer, dampings, layers, seeds

DAMPINGS = [1e-3, 1e-2, 0.1, 1.0, 30.0]
EXACT = layers((torch.float64,))


def gradients(samples: int = 9, size: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(size, 1, generator=generator, dtype=torch.float64)
    return common + torch.randn(size, samples, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("damping", DAMPINGS)
def test_the_oracle_states_equation_9(damping: float) -> None:
    exact = Dense(gradients(), damping)
    torch.testing.assert_close(exact.p, exact.natural_gradient(), rtol=1e-10, atol=0)
    assert float(exact.w.mean()) == pytest.approx(1, abs=1e-12)


@given(EXACT, dampings)
def test_weights_solve_equation_9(of: Layer, damping: float) -> None:
    exact = Dense(of.per_sample(bias=False), damping)
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


@given(EXACT, st.sampled_from([1e-60, 1e-8, 1.0, 1e8, 1e60]), seeds, dampings)
def test_weights_follow_their_samples_and_do_not_see_the_scale_of_the_gradient(
    of: Layer, scale: float, seed: int, damping: float
) -> None:
    k = Dense(of.per_sample(bias=False), damping).k
    order = torch.randperm(len(k), generator=torch.Generator().manual_seed(seed))
    expected = coefficients(k, damping).w[order]
    tolerance = 1e-12 * (1 + 1 / damping) * float(expected.abs().max())
    found = coefficients(k[order][:, order] * scale**2, damping)
    torch.testing.assert_close(found.w, expected, rtol=0, atol=tolerance)


@given(EXACT)
def test_infinite_damping_averages(of: Layer) -> None:
    u = of.per_sample(bias=False)
    k = Dense(u, 1.0).k
    limit = coefficients(k, 1e13)
    torch.testing.assert_close(limit.w, torch.ones_like(k[0]), rtol=0, atol=1e-12)
    plain = u.mean(dim=1).square().sum()
    if plain > 1e-6 * k.diagonal().max():
        torch.testing.assert_close(limit.rho, torch.linalg.matrix_norm(k) / plain, rtol=1e-5, atol=0)


@pytest.mark.parametrize("damping", DAMPINGS)
def test_float32_grams_are_solved_in_higher_precision(damping: float) -> None:
    k = Dense(gradients(), damping).k.float()
    found, exact = coefficients(k, damping), coefficients(k.double(), damping)
    assert found.w.dtype == found.rho.dtype == torch.float32
    assert torch.equal(found.w, exact.w.float())
    assert torch.equal(found.rho, exact.rho.float())


def test_the_natural_step_is_infinite_where_there_is_no_gradient() -> None:
    one = torch.ones(1)
    assert natural_step(one, one, torch.zeros(1), 0.1).isinf().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [1e-4, 1e-6])
def test_duplicated_samples_share_a_finite_weight(damping: float, dtype: torch.dtype) -> None:
    k = Dense(gradients(samples=5).repeat(1, 3), 1.0).k.to(dtype)
    found = coefficients(k, damping)
    assert torch.isfinite(found.w).all()
    assert torch.isfinite(found.rho)
    assert float(found.w.mean()) == pytest.approx(1, abs=1e-5)
    tolerance = {torch.float32: 3e-7 / damping, torch.float64: 1e-13 / damping}[dtype]
    w = found.w.view(3, 5).double()
    assert (w - w[:1]).abs().max() < tolerance


def with_bad_entry(value: float) -> torch.Tensor:
    k = Dense(gradients(), 1.0).k.clone()
    k[2, 3] = k[3, 2] = value
    return k


UNUSABLE = {
    "zero": torch.zeros(4, 4),
    "nan": with_bad_entry(torch.nan),
    "infinite": with_bad_entry(torch.inf),
    "indefinite": -torch.eye(4),
    "negative": torch.tensor([[1.0, -3.0], [-3.0, 1.0]]),
}


@pytest.mark.parametrize("k", UNUSABLE.values(), ids=UNUSABLE)
def test_an_unusable_gram_yields_averaging_without_a_ratio(k: torch.Tensor) -> None:
    found = coefficients(k, 0.01)
    assert torch.equal(found.w, torch.ones(len(k), dtype=k.dtype))
    assert found.rho.isnan()


@pytest.mark.parametrize("n", [1, 2, 16, 64])
def test_rho_is_one_for_equal_gradients_and_sqrt_n_for_orthogonal_ones(n: int) -> None:
    for damping in (1e-6, 1.0):
        assert coefficients(torch.ones(n, n).double(), damping).rho == pytest.approx(1, rel=1e-5)
        assert coefficients(torch.eye(n).double(), damping).rho == pytest.approx(n**0.5)
    assert torch.equal(coefficients(torch.tensor([[3.0]]), 1e-6).w, torch.ones(1))
