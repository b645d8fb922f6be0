"""The control experiments: what they keep of FNGD's weights, and what not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.arguments import OptimizerArguments
from common.controls import ShuffledWeights, shuffle_weights
from common.optimizers import callbacks
from hf_fngd import FNGD
from hf_fngd.coefficients import coefficients
from hf_fngd.sharing import NeverSharing


def test_shuffled_weights_are_each_steps_own_in_another_order() -> None:
    torch.manual_seed(0)
    u = torch.randn(50, 12, dtype=torch.float64)
    k = u.T @ u / 12
    exact = coefficients(k, 0.01)
    policy = NeverSharing()
    shuffle_weights(policy)
    first, second = policy.solve(k, 0.01), policy.solve(k, 0.01)
    for shuffled in (first, second):
        torch.testing.assert_close(shuffled.w.sort().values, exact.w.sort().values)
        assert not torch.equal(shuffled.w, exact.w)
        weighted = u @ shuffled.w / 12  # of h_n = u_n / N
        assert float(shuffled.rho) == pytest.approx(float(torch.linalg.matrix_norm(k) / weighted.square().sum()))
    assert not torch.equal(first.w, second.w)


def test_the_option_changes_the_optimizer_that_trains() -> None:
    arguments = OptimizerArguments(sharing="never", shuffle_weights=True)
    (control,) = [c for c in callbacks(arguments) if isinstance(c, ShuffledWeights)]
    gradients = []
    for shuffles in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(6, 3)
        optimizer = FNGD(model, sharing="never", damping=0.001)
        if shuffles:
            control.on_train_begin(optimizer=optimizer)
        model(torch.randn(8, 6)).square().mean().backward()
        gradients.append(model.weight.grad)
    assert not torch.allclose(*gradients, rtol=1e-3)


def test_it_is_fngds_alone() -> None:
    assert not any(isinstance(c, ShuffledWeights) for c in callbacks(OptimizerArguments()))
    with pytest.raises(ValueError, match="adamw has no use for --shuffle_weights"):
        OptimizerArguments(optimizer="adamw", shuffle_weights=True)
