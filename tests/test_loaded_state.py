"""What a loaded state brings with it: its settings count, and the config has them."""

from typing import Any

import pytest
import torch

from hf_fngd import FNGD
from tests.nets import net


def test_what_a_loaded_state_overrides_is_told_and_is_in_the_config(caplog: pytest.LogCaptureFixture) -> None:
    first, again, other = FNGD(net()), FNGD(net()), FNGD(net(), lr=0.3, weight_decay=0.5, momentum=0.5)
    torch.optim.lr_scheduler.LambdaLR(first, lambda step: 0.1)  # which is no other setting
    state = first.state_dict()
    again.load_state_dict(state)
    assert not caplog.text
    other.load_state_dict(state)
    assert "sets lr=0.001 (it was 0.3) in preconditioned, preconditioned_no_decay, plain_no_decay; " in caplog.text
    assert "weight_decay=0 (it was 0.5) in preconditioned; momentum=0.9 (it was 0.5) in preconditioned, " in caplog.text
    assert (other.config.lr, other.config.weight_decay, other.config.momentum) == (0.001, 0.0, 0.9)


GROUP = {"params": ["fc2"], "lr": 5e-3, "weight_decay": 0.5}


@pytest.mark.parametrize(
    ("saved", "built", "expected"),
    [
        ({"fallback_lr": 1e-2}, {}, {"fallback_lr": 1e-2}),
        ({"lr": 2e-3, "fallback_lr": 3e-2}, {"fallback_lr": 1e-2}, {"lr": 2e-3, "fallback_lr": 3e-2}),
        ({"lr": 2e-3}, {"fallback_lr": 1e-3}, {"lr": 2e-3, "fallback_lr": 2e-3}),
        ({"lr": 2e-3}, {}, {"lr": 2e-3, "fallback_lr": None}),
        ({"beta2": 0.95, "eps": 1e-6}, {}, {"beta2": 0.95, "eps": 1e-6}),
        ({"param_groups": [GROUP]}, {"param_groups": [GROUP | {"lr": 7e-3, "weight_decay": 0.3}]}, {"lr": 1e-3}),
    ],
)
def test_the_config_has_what_is_in_force_of_a_loaded_state(
    saved: dict[str, Any], built: dict[str, Any], expected: dict[str, Any]
) -> None:
    first, other = FNGD(net(), **saved), FNGD(net(), **built)
    other.load_state_dict(first.state_dict())
    assert {name: getattr(other.config, name) for name in expected} == expected
    again = FNGD.from_config(net(), other.config)
    for name in ("lr", "weight_decay", "momentum", "beta2", "eps"):
        assert [g[name] for g in again.param_groups] == [g[name] for g in first.param_groups], name
