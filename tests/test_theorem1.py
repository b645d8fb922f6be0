"""Convergence on the paper's ground (Sec. V): a wide two-layer ReLU network, one output, all samples in one batch.

Theorem 1 has ``F = J^T J / n`` for the Fisher matrix, J the Jacobian of the outputs f, and a Gram matrix that stays as
it is while W does: then ``f - y`` shrinks by a constant factor a step. Eq. 3, which FNGD computes, is the *empirical*
Fisher, with the samples' losses l_n in it: ``u_n = l_n'(f_n) J_n``. At vanishing damping its step ``U (U^T U)^-1 1``
moves the outputs by ``-lr / l_n'(f_n)``, and so lowers *every sample's loss by lr*, whatever J and the loss are. Hence:

* on the squared loss with a constant lr the theorem's conclusion does not hold. The loss falls along a line, not
  geometrically, and near zero steps of ``lr / r_n`` overshoot;
* on the logarithm of the squared error, equal decrements are equal factors: ``r_n`` shrinks by ``1 - lr`` a step.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hf_fngd import FNGD

SAMPLES, FEATURES, WIDTH = 24, 48, 2048
ALIKE = 0.8  # cosine between any two inputs, about; makes the Gram matrix of J ill-conditioned
Loss = Callable[[Tensor], Tensor]


class Wide(nn.Module):
    """The hidden layer is trained, the output layer is fixed; 0 at the start, as each neuron has its opposite."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(FEATURES, WIDTH, bias=False, dtype=torch.float64)
        half = torch.randn(WIDTH // 2, FEATURES, dtype=torch.float64)
        self.hidden.weight.data = torch.cat([half, half])
        self.register_buffer("output", torch.ones(WIDTH, dtype=torch.float64) / WIDTH**0.5)
        self.output[WIDTH // 2 :] *= -1

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.hidden(x)) @ self.output


def problem() -> tuple[Wide, Tensor, Tensor]:
    """The network, inputs of unit length, and labels of 1 and -1."""
    torch.manual_seed(0)
    model = Wide()
    own = nn.functional.normalize(torch.randn(SAMPLES, FEATURES, dtype=torch.float64), dim=1)
    common = nn.functional.normalize(torch.randn(FEATURES, dtype=torch.float64), dim=0)
    x = nn.functional.normalize(ALIKE**0.5 * common + (1 - ALIKE) ** 0.5 * own, dim=1)
    return model, x, torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(SAMPLES // 2)


def squared(error: Tensor) -> Tensor:
    return error.square() / 2


def logarithmic(error: Tensor) -> Tensor:
    return error.square().log() / 2


def descend(model: nn.Module, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer, loss: Loss, steps: int) -> Tensor:
    """The errors ``f - y`` before every step and after the last, ``[steps + 1, SAMPLES]``."""
    found = []
    for _ in range(steps):
        error = model(x) - y
        found.append(error.detach())
        optimizer.zero_grad()
        loss(error).mean().backward()
        optimizer.step()
    with torch.no_grad():
        return torch.stack([*found, model(x) - y])


def fngd(loss: Loss, lr: float, steps: int) -> Tensor:
    model, x, y = problem()
    optimizer = FNGD(model, lr=lr, update="momentum", momentum=0.0, damping=1e-8, sharing="never")
    return descend(model, x, y, optimizer, loss, steps)


class Averaging(torch.optim.SGD):
    """The same steps without the sample weights: ``1 / ||g||^2`` lowers the loss by lr, as far as it is linear."""

    def step(self, closure: None = None) -> None:
        (g,) = [p.grad for group in self.param_groups for p in group["params"]]
        g /= g.square().sum()
        super().step()


def averaging(loss: Loss, lr: float, steps: int) -> Tensor:
    model, x, y = problem()
    return descend(model, x, y, Averaging(model.parameters(), lr=lr), loss, steps)


def factors(errors: Tensor) -> Tensor:
    """By how much their norm changes in each step."""
    norms = errors.norm(dim=1)
    return norms[1:] / norms[:-1]


def curvatures() -> Tensor:
    """The eigenvalues of ``J J^T / n`` at the start, ascending."""
    model, x, _ = problem()
    rows = [torch.autograd.grad(output, model.hidden.weight, retain_graph=True)[0].flatten() for output in model(x)]
    jacobian = torch.stack(rows)
    return torch.linalg.eigvalsh(jacobian @ jacobian.T / SAMPLES)


# Equal decrements ------------------------------------------------------------------------------------------


def decrements(descent: Callable[[Loss, float, int], Tensor]) -> Tensor:
    """Of the samples' squared losses, in units of lr, ``[20, SAMPLES]``; at 25 of them the loss would be 0."""
    lr = 0.02
    losses = squared(descent(squared, lr, 20))
    return (losses[:-1] - losses[1:]) / lr


def test_each_step_lowers_every_samples_loss_by_the_learning_rate() -> None:
    found = decrements(fngd)
    assert found.min() > 0.75
    assert found.max() < 1.02


def test_plain_averaging_lowers_those_of_some_and_raises_those_of_others() -> None:
    found = decrements(averaging)
    assert found.min() < 0
    assert found.max() > 2


def test_with_a_constant_learning_rate_the_squared_loss_does_not_go_to_zero() -> None:
    lr = 0.02
    errors = fngd(squared, lr, 60)
    assert squared(errors).mean(dim=1)[30:].min() > lr


# Linear convergence ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lr", "steps"), [(0.3, 44), (0.5, 22)])
def test_the_errors_shrink_by_a_constant_factor_a_step(lr: float, steps: int) -> None:
    errors = fngd(logarithmic, lr, steps)
    found = factors(errors)
    assert errors[-1].norm() < 1e-6 * errors[0].norm()
    assert found.min() > 1 - lr - 0.02
    assert found.max() < 1 - lr + 0.12


def test_plain_averaging_does_not_make_them_shrink() -> None:
    errors = averaging(logarithmic, 0.5, 22)
    assert factors(errors).max() > 1
    assert errors[-1].norm() > 0.1 * errors[0].norm()


def test_gradient_descent_needs_many_times_the_steps() -> None:
    low, *_, high = curvatures().tolist()
    assert high > 100 * low
    ends = []
    for factor in (0.5, 1.0, 1.1):  # of the best constant step for a fixed J
        model, x, y = problem()
        optimizer = torch.optim.SGD(model.parameters(), lr=factor * 2 / (low + high))
        errors = descend(model, x, y, optimizer, squared, 220)
        ends.append(float(errors[-1].norm() / errors[0].norm()))
    assert min(ends) > 1e-3
    assert min(ends) < 0.1  # these steps are not too long
