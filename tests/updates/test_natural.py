"""The size of an update: the two step scales, and lambda in the diagnostics."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fngd import FNGD
from hf_fngd.arguments import UPDATES
from tests.nets import assert_equal, net, train, trained
from tests.reference import Dense, per_sample_gradients


def square(width: int, dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, width, dtype=dtype)


def uncorrelated(samples: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(samples, width, generator=generator, dtype=torch.float64)
    return x, torch.randint(width, (samples,), generator=generator)


def first_update(model: nn.Linear, x: Tensor, y: Tensor, scale: float = 1.0, **arguments: Any) -> Tensor:
    """What the first step adds to the layer's parameters, flat."""
    optimizer = FNGD(model, sharing="ranked", momentum=0.0, update="momentum", fallback="sgd", **arguments)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    (scale * F.cross_entropy(model(x), y)).backward()
    optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]) - before


def root_mean_square(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def dense(model: nn.Linear, x: Tensor, y: Tensor, damping: float) -> Dense:
    def alone(model: nn.Module, n: int) -> Tensor:
        return F.cross_entropy(model(x[n : n + 1]), y[n : n + 1])

    return Dense(per_sample_gradients(model, trained(model), alone, len(x)), damping)


@pytest.mark.parametrize("damping", [1e-3, 0.1, 30.0])
@pytest.mark.parametrize("width", [32, 128, 512])
def test_rms_updates_have_the_size_of_lr_at_any_width_and_damping(width: int, damping: float) -> None:
    """RMS = lr / sqrt(rho), exactly; lr at rho = 1.

    Width and damping enter through rho alone. For uncorrelated samples K is nearly a multiple of the identity
    and rho nearly sqrt(N), whatever the two are.
    """
    model, (x, y) = square(width), uncorrelated(8, width)
    rho = dense(model, x, y, damping).rho
    update = first_update(model, x, y, lr=0.01, damping=damping, step_scale="rms")
    assert root_mean_square(update) * float(rho.sqrt()) == pytest.approx(0.01, rel=1e-9)
    assert root_mean_square(update) == pytest.approx(0.01 / 8**0.25, rel=0.05)


@pytest.mark.parametrize("damping", [1e-3, 0.1, 30.0])
def test_rms_updates_have_the_size_of_lr_where_all_samples_agree(damping: float) -> None:
    model, (x, y) = square(32), uncorrelated(1, 32)
    update = first_update(model, x.repeat(8, 1), y.repeat(8), lr=0.01, damping=damping, step_scale="rms")
    assert root_mean_square(update) == pytest.approx(0.01, rel=1e-6)


@pytest.mark.parametrize("damping", [1e-3, 0.1, 30.0])
def test_ngd_updates_are_the_papers_within_the_trust_region(damping: float) -> None:
    """The paper's update shrinks as the loss is scaled up, and has no bound as it is scaled down."""
    model, (x, y) = square(32), uncorrelated(8, 32)
    exact = dense(model, x, y, damping)
    natural = -0.01 * exact.p / exact.lam_prime
    assert root_mean_square(natural) / 1e4 < 0.01 < root_mean_square(natural) * 1e4
    arguments = {"lr": 0.01, "damping": damping, "step_scale": "ngd"}
    within = first_update(square(32), x, y, scale=1e4, **arguments)
    torch.testing.assert_close(within, natural / 1e4, rtol=1e-8, atol=1e-14)
    bounded = first_update(square(32), x, y, scale=1e-4, **arguments)
    torch.testing.assert_close(bounded, natural * 0.01 / root_mean_square(natural), rtol=1e-8, atol=1e-14)


def test_a_later_rms_update_is_measured_by_a_running_mean() -> None:
    model, (x, y) = square(16), uncorrelated(8, 16)
    optimizer = FNGD(model, lr=0.0, update="momentum", fallback="sgd", step_scale="rms", sharing="never")
    for factor in (1.0, 10.0):
        optimizer.zero_grad()
        (factor * F.cross_entropy(model(x), y)).backward()
        optimizer.step()
    squared = sum(float(p.grad.square().sum()) for p in model.parameters())
    assert float(optimizer._scale.norms) == pytest.approx(squared * (0.95 / 100 + 0.05))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("power", [-16, 16])
def test_a_trajectory_does_not_see_the_loss_scale(power: int, update: str) -> None:
    models = [net(bias="none"), net(bias="none")]
    for model, scale in zip(models, (1.0, 2.0**power), strict=True):
        optimizer = FNGD(
            model, 0.01, update=update, step_scale="rms", fallback_lr=0.0, refresh=2, coefficient_steps=3, eps=1e-300
        )
        train(model, optimizer, 8, scale=scale)
    assert_equal(*models)
    assert not torch.equal(models[0].fc1.weight, net(bias="none").fc1.weight)


@pytest.mark.parametrize("update", ["adam", "muon"])
def test_scale_free_updates_do_not_ask_for_a_step_scale(update: str) -> None:
    models = [net(), net()]
    for model, step_scale in zip(models, ("rms", "ngd"), strict=True):
        train(model, FNGD(model, update=update, step_scale=step_scale), 4)
    assert_equal(*models)


@pytest.mark.parametrize("update", UPDATES)
def test_diagnostics_know_lambda(update: str) -> None:
    model, (x, y) = square(6), uncorrelated(5, 6)
    exact = dense(model, x, y, 0.01)
    optimizer = FNGD(model, sharing="ranked", damping=0.01, update=update)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert optimizer.diagnostics() == pytest.approx(
        {
            "phase": 0.0,
            "rho": float(exact.rho),
            "weight_spread": float(exact.w.std(correction=0)),
            "lambda": float(exact.lam),
            "skipped": 0.0,
        }
    )
