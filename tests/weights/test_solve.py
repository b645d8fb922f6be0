"""w, rho and the step scales against the dense Fisher matrix, and where the Gram matrix is bad."""

import pytest
import torch

from hf_fngd.weights.solve import coefficients, damping_from_gradient, natural_step
from tests.reference import Dense

DAMPINGS = [1e-3, 1e-2, 0.1, 1.0, 30.0]


def gradients(samples: int = 9, size: int = 20, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(size, 1, generator=generator, dtype=torch.float64)
    return common + torch.randn(size, samples, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("damping", DAMPINGS)
def test_the_oracle_states_equation_9(damping: float) -> None:
    exact = Dense(gradients(), damping)
    torch.testing.assert_close(exact.p, exact.natural_gradient(), rtol=1e-10, atol=0)
    assert float(exact.w.mean()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("size", [3, 20], ids=["singular", "regular"])
@pytest.mark.parametrize("damping", DAMPINGS)
def test_weights_and_noise_ratio_are_the_dense_ones(damping: float, size: int) -> None:
    exact = Dense(gradients(size=size), damping)
    found = coefficients(exact.k, damping)
    torch.testing.assert_close(found.w, exact.w, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.rho, exact.rho, rtol=1e-9, atol=0)


@pytest.mark.parametrize("damping", DAMPINGS)
def test_float32_grams_are_solved_in_higher_precision(damping: float) -> None:
    k = Dense(gradients(), damping).k.float()
    found, exact = coefficients(k, damping), coefficients(k.double(), damping)
    assert found.w.dtype == found.rho.dtype == torch.float32
    assert torch.equal(found.w, exact.w.float())
    assert torch.equal(found.rho, exact.rho.float())


@pytest.mark.parametrize("damping", DAMPINGS)
def test_lambda_and_the_natural_step_follow_from_the_gradient(damping: float) -> None:
    exact = Dense(gradients(), damping)
    squared, spread = exact.p.square().sum(), exact.w.square().mean()
    torch.testing.assert_close(damping_from_gradient(exact.rho, squared, damping), exact.lam)
    torch.testing.assert_close(natural_step(exact.rho, spread, squared, damping), 1 / exact.lam_prime)


def test_the_natural_step_is_infinite_where_there_is_no_gradient() -> None:
    one = torch.ones(1)
    assert natural_step(one, one, torch.zeros(1), 0.1).isinf().all()


@pytest.mark.parametrize("scale", [1e-150, 1e-20, 1e20, 1e150])
def test_coefficients_do_not_depend_on_the_scale_of_the_gram(scale: float) -> None:
    k = Dense(gradients(), 0.01).k
    found, expected = coefficients(k * scale, 0.01), coefficients(k, 0.01)
    torch.testing.assert_close(found.w, expected.w, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.rho, expected.rho, rtol=1e-10, atol=0)


def test_infinite_damping_averages() -> None:
    k = Dense(gradients(), 1.0).k
    limit = coefficients(k, 1e14)
    torch.testing.assert_close(limit.w, torch.ones(9, dtype=torch.float64), rtol=0, atol=1e-13)
    plain = gradients().mean(dim=1).square().sum()
    torch.testing.assert_close(limit.rho, torch.linalg.matrix_norm(k) / plain)


def test_permuting_the_samples_permutes_the_weights() -> None:
    k = Dense(gradients(), 1.0).k
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    found, expected = coefficients(k[order][:, order], 0.01), coefficients(k, 0.01)
    torch.testing.assert_close(found.w, expected.w[order])
    torch.testing.assert_close(found.rho, expected.rho)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [1e-4, 1e-6])
def test_duplicated_samples_share_a_finite_weight(damping: float, dtype: torch.dtype) -> None:
    u = gradients(samples=5).repeat(1, 3)
    k = Dense(u, 1.0).k.to(dtype)
    found = coefficients(k, damping)
    assert torch.isfinite(found.w).all()
    assert torch.isfinite(found.rho)
    assert float(found.w.mean()) == pytest.approx(1, abs=1e-5)
    tolerance = {torch.float32: 3e-7 / damping, torch.float64: 1e-13 / damping}[dtype]
    first, second, third = found.w.view(3, 5).double()
    assert (first - second).abs().max() < tolerance
    assert (first - third).abs().max() < tolerance


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


@pytest.mark.parametrize("damping", [1e-6, 1.0])
def test_one_sample_has_weight_one(damping: float) -> None:
    found = coefficients(torch.tensor([[3.0]]), damping)
    assert torch.equal(found.w, torch.ones(1))
    assert float(found.rho) == 1


@pytest.mark.parametrize("n", [2, 16, 64])
def test_rho_is_one_for_equal_gradients_and_sqrt_n_for_orthogonal_ones(n: int) -> None:
    assert coefficients(torch.ones(n, n).double(), 1.0).rho == pytest.approx(1)
    assert coefficients(torch.eye(n).double(), 1.0).rho == pytest.approx(n**0.5)
