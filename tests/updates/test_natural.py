"""The size of the paper's update, and lambda in the diagnostics."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fngd import FNGD, policy_names
from tests.nets import UPDATES_OF, net, settings_of
from tests.steps import assert_equal, dense, train


def square(width: int) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, width, dtype=torch.float64)


def uncorrelated(samples: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(samples, width, generator=generator, dtype=torch.float64)
    return x, torch.randint(width, (samples,), generator=generator)


def first_update(model: nn.Linear, x: Tensor, y: Tensor, scale: float, **arguments: Any) -> Tensor:
    """What the first step adds to the layer's parameters, flat."""
    optimizer = FNGD(model, sharing="replay", momentum=0.0, update="momentum", fallback="sgd", **arguments)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    (scale * F.cross_entropy(model(x), y)).backward()
    optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]) - before


def root_mean_square(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize("damping", [1e-3, 0.1, 30.0])
def test_updates_are_the_papers_within_the_trust_region(damping: float) -> None:
    """The paper's update shrinks as the loss is scaled up, and has no bound as it is scaled down."""
    model, (x, y) = square(32), uncorrelated(8, 32)
    exact = dense(model, x, y, damping, [""])[""]
    natural = -0.01 * exact.p / exact.lam_prime
    assert root_mean_square(natural) / 1e4 < 0.01 < root_mean_square(natural) * 1e4
    arguments = {"lr": 0.01, "damping": damping}
    within = first_update(square(32), x, y, 1e4, **arguments)
    torch.testing.assert_close(within, natural / 1e4, rtol=1e-8, atol=1e-14)
    bounded = first_update(square(32), x, y, 1e-4, **arguments)
    torch.testing.assert_close(bounded, natural * 0.01 / root_mean_square(natural), rtol=1e-8, atol=1e-14)


SCALE_FREE = [(name, update) for name in policy_names() for update in UPDATES_OF[name] if update != "momentum"]


@pytest.mark.parametrize(("sharing", "update"), SCALE_FREE)
@pytest.mark.parametrize("power", [-16, 16])
def test_a_trajectory_does_not_see_the_loss_scale(power: int, sharing: str, update: str) -> None:
    models = [net(bias="none"), net(bias="none")]
    arguments = settings_of(sharing, coefficient_steps=3)
    for model, scale in zip(models, (1.0, 2.0**power), strict=True):
        optimizer = FNGD(model, 0.01, update=update, fallback_lr=0.0, eps=1e-300, **arguments)
        train(model, optimizer, 6, scale=scale)
    assert_equal(*models)
    assert not torch.equal(models[0].fc1.weight, net(bias="none").fc1.weight)


@pytest.mark.parametrize("update", UPDATES_OF["never"])
def test_diagnostics_know_lambda(update: str) -> None:
    model, (x, y) = square(6), uncorrelated(5, 6)
    exact = dense(model, x, y, 0.01, [""])[""]
    optimizer = FNGD(model, sharing="replay", damping=0.01, update=update)
    assert optimizer.diagnostics()["lambda"] != optimizer.diagnostics()["lambda"]  # NaN: there is no gradient yet
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    measured = {"rho": exact.rho, "weight_spread": exact.w.std(correction=0), "lambda": exact.lam}
    expected = {name: float(value) for name, value in measured.items()} | {"phase": 0.0, "skipped": 0.0}
    assert optimizer.diagnostics() == pytest.approx(expected)
