"""What one backward pass does to p.grad, against the dense Fisher matrix, and what must not go wrong in it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_fngd import FNGDPreconditioner, policy_names
from hf_fngd.weights.solve import damping_from_gradient, natural_step
from tests.nets import (
    FEATURES,
    LAYER_NAMES,
    LAYERS,
    Net,
    Watched,
    data,
    dense,
    gradient,
    loss,
    net,
    relative_error,
)

DAMPINGS = [1e-3, 1e-2, 0.1, 1.0, 30.0]
# What lies between the batch and the features: inputs of 2, 3 and 4 dimensions.
BETWEEN = [(), (3,), (2, 2)]


# The oracle ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize(("layer_type", "bias"), LAYERS)
def test_the_gradient_is_the_damped_natural_gradient(
    layer_type: str, bias: str, between: tuple[int, ...], damping: float
) -> None:
    model, (x, y) = net(layer_type=layer_type, bias=bias), data(7, *between)
    exact = dense(model, x, y, damping)
    plain = torch.autograd.grad(loss(model, x, y), list(model.norm.parameters()))
    policy = Watched()
    preconditioner = FNGDPreconditioner(model, damping=damping, sharing=policy)
    loss(model, x, y).backward()
    weights = policy.w
    preconditioner.step()
    for place, name in enumerate(LAYER_NAMES):
        assert relative_error(gradient(model.get_submodule(name)), exact[name].natural_gradient()) < 1e-9
        assert relative_error(weights[place], exact[name].w) < 1e-9
        assert relative_error(policy.rho[place], exact[name].rho) < 1e-9
    for p, expected in zip(model.norm.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("layer_type", ["Linear", "Conv1D"])
def test_float32_is_enough(layer_type: str, between: tuple[int, ...], damping: float) -> None:
    model, (x, y) = net(layer_type=layer_type, dtype=torch.float32), data(7, *between, dtype=torch.float32)
    exact = dense(copy.deepcopy(model).double(), x.double(), y, damping)
    FNGDPreconditioner(model, sharing="never", damping=damping)
    loss(model, x, y).backward()
    for name in LAYER_NAMES:
        assert relative_error(gradient(model.get_submodule(name)), exact[name].natural_gradient()) < 1e-4


@pytest.mark.parametrize("budget", [1, 1000, 10_000])
@pytest.mark.parametrize("between", [(), (11,)], ids=["ghost", "formed"])
def test_the_memory_budget_does_not_change_the_result(between: tuple[int, ...], budget: int) -> None:
    model, (x, y) = net(), data(9, *between)
    exact = dense(model, x, y, 0.01)
    FNGDPreconditioner(model, sharing="never", damping=0.01, memory_budget=budget)
    loss(model, x, y).backward()
    for name in LAYER_NAMES:
        assert relative_error(gradient(model.get_submodule(name)), exact[name].p) < 1e-9


def test_conv1d_is_a_linear_with_its_weight_transposed() -> None:
    linear, conv1d, (x, y) = net(), net(layer_type="Conv1D"), data(7, 3)
    with torch.no_grad():
        for name in LAYER_NAMES:
            ours, theirs = conv1d.get_submodule(name), linear.get_submodule(name)
            ours.weight.copy_(theirs.weight.t())
            ours.bias.copy_(theirs.bias)
    engines = [FNGDPreconditioner(model, sharing="never", damping=0.01) for model in (linear, conv1d)]
    for model, engine in zip((linear, conv1d), engines, strict=True):
        loss(model, x, y).backward()
        engine.step()
    torch.testing.assert_close(*(engine.policy.rho for engine in engines))
    for name in LAYER_NAMES:
        ours, theirs = conv1d.get_submodule(name), linear.get_submodule(name)
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad.t())
        torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)


@pytest.mark.parametrize("sharing", policy_names())
def test_the_input_gets_the_plain_gradient(sharing: str) -> None:
    model, (x, y) = net(), data(7, 3)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(loss(model, x, y), x)
    FNGDPreconditioner(model, sharing=sharing)
    loss(model, x, y).backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("damping", [1.0, 0.1, 0.01])
def test_lambda_and_the_natural_step_are_known_in_a_coefficient_step(damping: float) -> None:
    model, (x, y) = net(), data(7, 3)
    exact = dense(model, x, y, damping)
    preconditioner = FNGDPreconditioner(model, sharing="never", damping=damping)
    loss(model, x, y).backward()
    preconditioner.step()
    squared = torch.stack([gradient(model.get_submodule(name)).square().sum() for name in LAYER_NAMES])
    lam = torch.stack([exact[name].lam for name in LAYER_NAMES])
    inverse = torch.stack([1 / exact[name].lam_prime for name in LAYER_NAMES])
    rho, spread = preconditioner.policy.rho, preconditioner.policy.spread
    torch.testing.assert_close(damping_from_gradient(rho, squared, damping), lam, rtol=1e-9, atol=0)
    torch.testing.assert_close(natural_step(rho, spread, squared, damping), inverse, rtol=1e-9, atol=0)


def test_huge_damping_is_sgd() -> None:
    trajectories = []
    for attached in (True, False):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if attached:
            FNGDPreconditioner(model, damping=1e12, sharing="never").follow(optimizer)
        for step in range(20):
            optimizer.zero_grad()
            loss(model, *data(7, 3, seed=step)).backward()
            optimizer.step()
        trajectories.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*trajectories, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("sharing", policy_names())
def test_a_retained_graph_keeps_its_weights(sharing: str) -> None:
    """So that its gradient is linear in the loss, whatever the norms in the later backward passes are."""
    model, (x, y) = net(), data(6, 3)
    preconditioner = FNGDPreconditioner(model, sharing=sharing)
    for seed in range(2):
        x, y = data(6, 3, seed=seed)
        each = F.cross_entropy(model(x), y, reduction="none")
        factors = torch.arange(6.0, dtype=torch.float64), torch.arange(7.0, 1.0, -1.0, dtype=torch.float64)
        found = []
        for of in (*factors, sum(factors)):
            model.zero_grad()
            (each * of).sum().backward(retain_graph=True)
            found.append(gradient(model))
        torch.testing.assert_close(found[0] + found[1], found[2])
        preconditioner.step()
        preconditioner.end_epoch()  # the second step is a shared one of replay
    assert preconditioner.coverage().missed == {}


# Scale of the loss -----------------------------------------------------------------------------------------


def weights_at(scale: float, dtype: torch.dtype, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    model, (x, y) = net(dtype=dtype), data(7, 3, dtype=dtype)
    policy = Watched()
    preconditioner = FNGDPreconditioner(model, damping=damping, sharing=policy)
    (scale * loss(model, x, y)).backward()
    preconditioner.step()
    return policy.w, policy.rho


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [-40, -16, 16, 40])
def test_powers_of_two_in_the_loss_leave_the_weights_bit_for_bit(power: int, dtype: torch.dtype) -> None:
    for found, expected in zip(weights_at(2.0**power, dtype), weights_at(1.0, dtype), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("dtype", "damping", "tolerance"), [(torch.float64, 0.001, 1e-9), (torch.float32, 1.0, 1e-6)])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_other_scales_leave_the_weights_to_rounding(
    scale: float, dtype: torch.dtype, damping: float, tolerance: float
) -> None:
    pairs = zip(weights_at(scale, dtype, damping), weights_at(1.0, dtype, damping), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_extreme_gradients_have_the_usual_weights(scale: float) -> None:
    w, rho = weights_at(scale, torch.float32)
    expected, of_rho = weights_at(1.0, torch.float32)
    torch.testing.assert_close(w, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(rho, of_rho, rtol=1e-3, atol=0)


# Safety ----------------------------------------------------------------------------------------------------


def test_zero_gradients_average_and_leave_no_trace() -> None:
    model, (x, y) = net(), data(7)
    policy = Watched()
    preconditioner = FNGDPreconditioner(model, sharing=policy)
    (0.0 * loss(model, x, y)).backward()
    assert torch.equal(policy.w, torch.ones(2, 7, dtype=torch.float64))
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())
    preconditioner.step()
    assert policy.rho.isnan().all()
    loss(model, x, y).backward()
    preconditioner.step()
    assert torch.isfinite(policy.rho).all()


@pytest.mark.parametrize("damping", [1e-6, 1.0])
def test_a_single_sample_gets_the_plain_gradient(damping: float) -> None:
    model, (x, y) = net(), data(1, 3)
    expected = torch.autograd.grad(loss(model, x, y), list(model.parameters()))
    FNGDPreconditioner(model, sharing="never", damping=damping)
    loss(model, x, y).backward()
    for p, plain in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [1e-4, 1e-6])
def test_duplicated_samples_are_safe_and_treated_alike(damping: float, dtype: torch.dtype) -> None:
    model, (x, y) = net(dtype=dtype), data(4, 3, dtype=dtype)
    policy = Watched()
    preconditioner = FNGDPreconditioner(model, damping=damping, sharing=policy)
    loss(model, x.repeat(3, 1, 1), y.repeat(3)).backward()
    w = policy.w.double().view(2, 3, 4)
    preconditioner.step()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert torch.isfinite(policy.rho).all()
    torch.testing.assert_close(w.mean(dim=(1, 2)), torch.ones(2, dtype=torch.float64), rtol=1e-5, atol=0)
    tolerance = {torch.float32: 1e-6 / damping, torch.float64: 1e-13 / damping}[dtype]
    assert (w - w.mean(dim=1, keepdim=True)).abs().max() < tolerance


@pytest.mark.parametrize("sharing", policy_names())
@pytest.mark.parametrize("x", [torch.zeros(0, FEATURES), torch.zeros(0, 3, FEATURES), torch.zeros(4, 0, FEATURES)])
def test_empty_batches_pass_through(x: Tensor, sharing: str) -> None:
    model = net()
    preconditioner = FNGDPreconditioner(model, sharing=sharing)
    model.fc1(x.double()).sum().backward()
    model(x.double()).nansum().backward()
    preconditioner.step()
    assert torch.equal(model.fc1.weight.grad, torch.zeros_like(model.fc1.weight))


# Other ways to run a model ---------------------------------------------------------------------------------


class Checkpointed(Net):
    """Recomputes its first layers in the backward pass."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(lambda x: torch.tanh(self.norm(self.fc1(x))), x, use_reentrant=self.reentrant)
        return checkpoint(self.fc2, hidden, use_reentrant=self.reentrant).mean(1)


# Whose second step is a shared one with "replay".
SHARINGS = pytest.mark.parametrize("sharing", ["never", "replay", "clipped"])


@SHARINGS
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradient(reentrant: bool, sharing: str) -> None:
    found = []
    for model_type in (Net, Checkpointed):
        torch.manual_seed(0)
        model = model_type().double()
        model.reentrant = reentrant
        preconditioner = FNGDPreconditioner(model, sharing=sharing)
        for seed in range(2):
            model.zero_grad()
            x, y = data(7, 3, seed=seed)
            loss(model, x.requires_grad_(), y).backward()
            preconditioner.step()
            preconditioner.end_epoch()
        assert preconditioner.coverage().missed == {}
        found.append(gradient(model))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


@SHARINGS
@pytest.mark.parametrize("layer_type", ["Linear", "Conv1D"])
def test_autocast_preconditions_in_bfloat16(layer_type: str, sharing: str) -> None:
    found = []
    for enabled in (True, False):
        model = net(dtype=torch.float32, layer_type=layer_type)
        preconditioner = FNGDPreconditioner(model, sharing=sharing)
        for seed in range(2):
            model.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                value = loss(model, *data(7, 3, seed=seed, dtype=torch.float32))
            value.backward()
            preconditioner.step()
            preconditioner.end_epoch()
        assert preconditioner.coverage().missed == {}
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        found.append(gradient(model))
    assert relative_error(*found) < 0.03


def test_autocast_leaves_float64_alone() -> None:
    model, plain, (x, _) = net(), net(), data(7, 3)
    FNGDPreconditioner(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert plain(x).dtype == torch.float64
        assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_have_weights_in_float32(dtype: torch.dtype) -> None:
    model, (x, y) = net(dtype=dtype), data(7, 3, dtype=dtype)
    exact = dense(copy.deepcopy(model).double(), x.double(), y, 0.1)
    policy = Watched()
    FNGDPreconditioner(model, damping=0.1, sharing=policy)
    loss(model, x, y).backward()
    assert policy.w.dtype == torch.float32
    for place, name in enumerate(LAYER_NAMES):
        assert model.get_submodule(name).weight.grad.dtype == dtype
        assert relative_error(policy.w[place].double(), exact[name].w) < 0.05
