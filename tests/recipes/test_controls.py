"""The control experiments: what they keep of FNGD's weights, and what not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from common.arguments import OptimizerArguments
from common.controls import CONTROLS, Control, replace_weights
from common.optimizers import callbacks
from hf_fngd import FNGD
from hf_fngd.coefficients import Coefficients, coefficients
from hf_fngd.sharing import NeverSharing


def gradients() -> Tensor:
    """Twelve samples' gradients ``[50, 12]``, one of which is a hundred times as large."""
    torch.manual_seed(0)
    u = torch.randn(50, 12, dtype=torch.float64)
    u[:, 3] *= 100
    return u


class Classifier(nn.Linear):
    """A model whose output is a dictionary."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": super().forward(x)}


def solved(control: str, u: Tensor, damping: float) -> Coefficients:
    policy = NeverSharing()
    replace_weights(policy, CONTROLS[control][0](Classifier(6, 3), 1))
    return policy.solve(u.T @ u / 12, damping)


@pytest.mark.parametrize("control", [name for name in CONTROLS if name != "improved"])
def test_weights_have_mean_1_and_the_rho_of_the_gradient_that_they_make(control: str) -> None:
    u = gradients()
    found = solved(control, u, 0.01)
    assert float(found.w.mean()) == pytest.approx(1)
    weighted = u @ found.w / 12  # of h_n = u_n / N
    assert float(found.rho) == pytest.approx(float(torch.linalg.matrix_norm(u.T @ u / 12) / weighted.square().sum()))


def test_shuffled_weights_are_each_steps_own_in_another_order() -> None:
    u = gradients()
    exact = coefficients(u.T @ u / 12, 0.01).w
    first, second = solved("shuffled", u, 0.01).w, solved("shuffled", u, 0.01).w
    for shuffled in (first, second):
        torch.testing.assert_close(shuffled.sort().values, exact.sort().values)
        assert not torch.equal(shuffled, exact)
    assert not torch.equal(first, second)


def test_the_diagonal_is_all_there_is_of_orthogonal_gradients() -> None:
    u = torch.linalg.qr(gradients()).Q * torch.arange(1, 13)
    torch.testing.assert_close(solved("diagonal", u, 0.01).w, coefficients(u.T @ u / 12, 0.01).w)
    u[:, 0] += u[:, 1]
    assert not torch.allclose(solved("diagonal", u, 0.01).w, coefficients(u.T @ u / 12, 0.01).w, rtol=0.01)


def test_pairs_share_the_weights_of_their_upper_layer() -> None:
    policy = NeverSharing()
    replace_weights(policy, CONTROLS["pairs"][0](Classifier(6, 3), 5))
    grams = [u.T @ u / 12 for u in torch.randn(2, 5, 50, 12, dtype=torch.float64).flatten(0, 1)]
    own = [coefficients(k, 0.01).w for k in grams]
    found = [policy.solve(k, 0.01).w for k in grams]
    for step in (0, 5):  # each from the fifth layer down to the first
        for place, upper in enumerate((0, 1, 1, 3, 3)):
            torch.testing.assert_close(found[step + place], own[step + upper])


def test_a_third_of_the_layers_have_weights() -> None:
    u = gradients()
    exact = coefficients(u.T @ u / 12, 0.01).w
    found = [solved("third", u, 0.01).w for _ in range(300)]
    weighed = [w for w in found if not torch.equal(w, torch.ones_like(w))]
    assert 70 < len(weighed) < 130
    for w in weighed:
        torch.testing.assert_close(w, exact)


def test_improved_weights_make_losses_fall_by_their_squared_gradients_at_the_logits() -> None:
    torch.manual_seed(0)
    model = Classifier(20, 3, bias=False).double()
    policy = NeverSharing()
    replace_weights(policy, CONTROLS["improved"][0](model, 1))
    x, y = torch.randn(8, 20, dtype=torch.float64), torch.randint(3, (8,))
    losses = nn.functional.cross_entropy(model(x)["logits"], y, reduction="none")
    u = torch.stack([torch.autograd.grad(loss, model.weight, retain_graph=True)[0].flatten() for loss in losses], 1)
    losses.sum().backward()
    w = policy.solve(u.T @ u / 8, 1e-12).w
    at_logits = torch.softmax(model(x)["logits"], 1) - nn.functional.one_hot(y, 3)
    falls = u.T @ (u @ w)
    torch.testing.assert_close(falls / falls[0], (at_logits.norm(dim=1) / at_logits[0].norm()).square())


def test_the_option_changes_the_optimizer_that_trains() -> None:
    arguments = OptimizerArguments(sharing="never", control="shuffled")
    (control,) = [c for c in callbacks(arguments) if isinstance(c, Control)]
    made = []
    for used in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(6, 3)
        optimizer = FNGD(model, sharing="never", damping=0.001)
        if used:
            control.on_train_begin(model=model, optimizer=optimizer)
        model(torch.randn(8, 6)).square().mean().backward()
        made.append(model.weight.grad)
    assert not torch.allclose(*made, rtol=1e-3)


def test_it_is_fngds_alone_and_one_of_those_that_exist() -> None:
    assert not any(isinstance(c, Control) for c in callbacks(OptimizerArguments()))
    with pytest.raises(ValueError, match="adamw has no use for --control"):
        OptimizerArguments(optimizer="adamw", control="diagonal")
    with pytest.raises(ValueError, match="--control random does not exist; there are shuffled, diagonal, third"):
        OptimizerArguments(control="random")
