"""The size of the paper's update, and lambda in the diagnostics."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_fngd import FNGD, policy_names
from tests.nets import LAYER_NAMES, UPDATES_OF, assert_equal, data, dense, loss, net, settings_of, train

BATCH = data(8, 3)


def first_update(scale: float, **arguments: Any) -> dict[str, Tensor]:
    """What the first step adds to the layers' parameters, flat."""
    model, plain = net(width=32), net(width=32)
    optimizer = FNGD(model, lr=0.01, sharing="replay", momentum=0.0, update="momentum", **arguments)
    (scale * loss(model, *BATCH)).backward()
    optimizer.step()
    with torch.no_grad():
        moved = {name: p - plain.get_parameter(name) for name, p in model.named_parameters()}
    return {name: torch.cat([moved[f"{name}.weight"].flatten(), moved[f"{name}.bias"]]) for name in LAYER_NAMES}


@pytest.mark.parametrize("damping", [1e-3, 0.1, 30.0])
def test_updates_are_the_papers_within_the_trust_region(damping: float) -> None:
    """The paper's update shrinks as the loss is scaled up, and has no bound as it is scaled down."""
    exact = dense(net(width=32), *BATCH, damping)
    within, bounded = (first_update(scale, damping=damping) for scale in (1e4, 1e-4))
    for name, of in exact.items():
        natural = -0.01 * of.p / of.lam_prime
        size = float(natural.square().mean().sqrt())
        assert size / 1e4 < 0.01 < size * 1e4
        torch.testing.assert_close(within[name], natural / 1e4, rtol=1e-8, atol=1e-14)
        torch.testing.assert_close(bounded[name], natural * 0.01 / size, rtol=1e-8, atol=1e-14)


SCALE_FREE = [(name, update) for name in policy_names() for update in UPDATES_OF[name] if update != "momentum"]


@pytest.mark.parametrize(("sharing", "update"), SCALE_FREE)
@pytest.mark.parametrize(("dtype", "power"), [(torch.float64, -16), (torch.float64, 16), (torch.float32, -50)])
def test_a_trajectory_does_not_see_the_loss_scale(power: int, dtype: torch.dtype, sharing: str, update: str) -> None:
    models = [net(bias="none", dtype=dtype), net(bias="none", dtype=dtype)]
    arguments, eps = settings_of(sharing, coefficient_steps=3), 1e-300 if dtype == torch.float64 else 1e-30
    for model, scale in zip(models, (1.0, 2.0**power), strict=True):
        optimizer = FNGD(model, 0.01, update=update, fallback_lr=0.0, eps=eps, **arguments)
        train(model, optimizer, 6, scale=scale)
    if dtype == torch.float64:
        assert_equal(*models)
    else:  # where squares leave the range of exact powers
        torch.testing.assert_close(*([*model.parameters()] for model in models), rtol=1e-3, atol=1e-4)
    assert not torch.equal(models[0].fc1.weight, net(bias="none", dtype=dtype).fc1.weight)


@pytest.mark.parametrize("update", UPDATES_OF["never"])
def test_diagnostics_know_lambda(update: str) -> None:
    model = net()
    exact = dense(model, *BATCH, 0.01).values()
    optimizer = FNGD(model, sharing="replay", damping=0.01, update=update, coefficient_steps=2)
    found = optimizer.diagnostics()
    assert found.pop("lambda") != 0  # NaN: there is no gradient yet
    assert found == {"phase": 0.0, "weight_spread": 0.0, "skipped": 0.0}
    loss(model, *BATCH).backward()
    optimizer.step()
    rho, lam = (torch.stack([getattr(of, name) for of in exact]).log().mean().exp() for name in ("rho", "lam"))
    spread = torch.stack([of.w.var(correction=0) for of in exact]).mean().sqrt()
    expected = {"phase": 0.0, "rho": float(rho), "weight_spread": float(spread), "lambda": float(lam), "skipped": 0.0}
    assert optimizer.diagnostics() == pytest.approx(expected)
    loss(model, *BATCH).backward()
    optimizer.step()
    assert optimizer.diagnostics()["phase"] == 1.0
