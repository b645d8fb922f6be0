"""The engine on whole models: p.grad against the dense Fisher matrix, the phases, and what must not go wrong."""

import copy
import gc
import io
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_fngd import FNGD, FNGDPreconditioner, detach
from hf_fngd.backward import CALLED_AGAIN, NOT_THE_BATCH
from hf_fngd.coefficients import damping_from_gradient, natural_step
from hf_fngd.coverage import NEVER_CALLED
from hf_fngd.sharing import INDEX_COLUMN, IndexSharing, SharingPolicy, policy_names
from tests.nets import CLASSES, FEATURES, LAYERS, Net, data, loss, net, relative_error, trained
from tests.reference import Dense, per_sample_gradients

DAMPINGS = [1e-3, 1e-2, 0.1, 1.0, 30.0]
LAYER_NAMES = ("fc1", "fc2")
# What lies between the batch and the features: inputs of 2, 3 and 4 dimensions.
BETWEEN = [(), (3,), (2, 2)]


def dense(model: nn.Module, x: Tensor, y: Tensor, damping: float) -> dict[str, Dense]:
    """The oracle for both layers of a plain model."""

    def alone(model: nn.Module, n: int) -> Tensor:
        return loss(model, x[n : n + 1], y[n : n + 1])

    layers = {name: trained(model.get_submodule(name)) for name in LAYER_NAMES}
    return {name: Dense(per_sample_gradients(model, of, alone, len(x)), damping) for name, of in layers.items()}


def gradient(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in trained(module)]).double()


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in trained(model)]


def fresh_weights(preconditioner: FNGDPreconditioner) -> Tensor:
    """The weights of the coefficient step under way, ``[L, N]``, in the order that the policy keeps."""
    (batch,) = preconditioner._window._batches
    assert batch.fresh is not None
    return batch.fresh


# The oracle ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize(("layer_type", "bias"), LAYERS)
def test_the_gradient_is_the_damped_natural_gradient(
    layer_type: str, bias: str, between: tuple[int, ...], damping: float
) -> None:
    model, (x, y) = net(layer_type=layer_type, bias=bias), data(7, *between)
    exact = dense(model, x, y, damping)
    plain = torch.autograd.grad(loss(model, x, y), list(model.norm.parameters()))
    preconditioner = FNGDPreconditioner(model, damping=damping, sharing="last")
    loss(model, x, y).backward()
    weights = fresh_weights(preconditioner)
    preconditioner.step()
    for place, name in enumerate(LAYER_NAMES):
        assert relative_error(gradient(model.get_submodule(name)), exact[name].natural_gradient()) < 1e-9
        assert relative_error(weights[place], exact[name].w) < 1e-9
        assert relative_error(preconditioner.rho[place], exact[name].rho) < 1e-9
    for p, expected in zip(model.norm.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("layer_type", ["Linear", "Conv1D"])
def test_float32_is_enough(layer_type: str, between: tuple[int, ...], damping: float) -> None:
    model, (x, y) = net(layer_type=layer_type, dtype=torch.float32), data(7, *between, dtype=torch.float32)
    exact = dense(copy.deepcopy(model).double(), x.double(), y, damping)
    FNGDPreconditioner(model, damping=damping)
    loss(model, x, y).backward()
    for name in LAYER_NAMES:
        assert relative_error(gradient(model.get_submodule(name)), exact[name].natural_gradient()) < 1e-4


@pytest.mark.parametrize("budget", [1, 1000, 10_000])
@pytest.mark.parametrize("between", [(), (11,)], ids=["ghost", "formed"])
def test_the_memory_budget_does_not_change_the_result(between: tuple[int, ...], budget: int) -> None:
    model, (x, y) = net(), data(9, *between)
    exact = dense(model, x, y, 0.01)
    FNGDPreconditioner(model, damping=0.01, memory_budget=budget)
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
    engines = [FNGDPreconditioner(model, damping=0.01) for model in (linear, conv1d)]
    for model, engine in zip((linear, conv1d), engines, strict=True):
        loss(model, x, y).backward()
        engine.step()
    torch.testing.assert_close(*(engine.rho for engine in engines))
    for name in LAYER_NAMES:
        ours, theirs = conv1d.get_submodule(name), linear.get_submodule(name)
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad.t())
        torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)


def test_the_input_gets_the_plain_gradient() -> None:
    model, (x, y) = net(), data(7, 3)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(loss(model, x, y), x)
    FNGDPreconditioner(model)
    loss(model, x, y).backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("damping", [1.0, 0.1, 0.01])
def test_lambda_and_the_natural_step_are_known_in_a_coefficient_step(damping: float) -> None:
    model, (x, y) = net(), data(7, 3)
    exact = dense(model, x, y, damping)
    preconditioner = FNGDPreconditioner(model, damping=damping)
    loss(model, x, y).backward()
    preconditioner.step()
    squared = torch.stack([gradient(model.get_submodule(name)).square().sum() for name in LAYER_NAMES])
    lam = torch.stack([exact[name].lam for name in LAYER_NAMES])
    inverse = torch.stack([1 / exact[name].lam_prime for name in LAYER_NAMES])
    rho, spread = preconditioner.rho, preconditioner.spread
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


# Scale of the loss ---------------------------------------------------------------------------------------


def weights_at(scale: float, dtype: torch.dtype, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    model, (x, y) = net(dtype=dtype), data(7, 3, dtype=dtype)
    preconditioner = FNGDPreconditioner(model, damping=damping, sharing="last")
    (scale * loss(model, x, y)).backward()
    w = fresh_weights(preconditioner)
    preconditioner.step()
    return w, preconditioner.rho


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


# Safety --------------------------------------------------------------------------------------------------


def test_zero_gradients_average_and_leave_no_trace() -> None:
    model, (x, y) = net(), data(7)
    preconditioner = FNGDPreconditioner(model, sharing="last")
    (0.0 * loss(model, x, y)).backward()
    assert torch.equal(fresh_weights(preconditioner), torch.ones(2, 7, dtype=torch.float64))
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())
    preconditioner.step()
    assert preconditioner.rho.isnan().all()
    loss(model, x, y).backward()
    preconditioner.step()
    assert torch.isfinite(preconditioner.rho).all()


@pytest.mark.parametrize("damping", [1e-6, 1.0])
def test_a_single_sample_gets_the_plain_gradient(damping: float) -> None:
    model, (x, y) = net(), data(1, 3)
    expected = torch.autograd.grad(loss(model, x, y), list(model.parameters()))
    FNGDPreconditioner(model, damping=damping)
    loss(model, x, y).backward()
    for p, plain in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, plain)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("sharing", policy_names())
def test_a_batch_that_is_not_finite_leaves_store_and_ratio_alone(sharing: str, value: float) -> None:
    model, (x, y) = net(), data(7, 3)
    index = {INDEX_COLUMN: torch.arange(7)} if sharing == "index" else {}
    preconditioner = FNGDPreconditioner(model, sharing=sharing)
    F.cross_entropy(model(x, **index), y).backward()
    preconditioner.step()
    before, rho = copy.deepcopy(preconditioner.state_dict()), preconditioner.rho.clone()
    spoilt = x.clone()
    spoilt[2] = value
    F.cross_entropy(model(spoilt, **index), y).backward()
    preconditioner.step()
    after = preconditioner.state_dict()
    assert torch.equal(preconditioner.rho, rho)
    assert torch.equal(after["averages"], before["averages"])
    rows = before["policy"].get("rows")
    if rows is not None:  # replay: the spoilt batch has a row of its own
        assert torch.equal(after["policy"]["rows"], torch.cat([rows, torch.ones_like(rows)]))
    else:
        assert after["policy"].keys() == before["policy"].keys()
        for key, stored in before["policy"].items():
            assert torch.equal(after["policy"][key], stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [1e-4, 1e-6])
def test_duplicated_samples_are_safe_and_treated_alike(damping: float, dtype: torch.dtype) -> None:
    model, (x, y) = net(dtype=dtype), data(4, 3, dtype=dtype)
    preconditioner = FNGDPreconditioner(model, damping=damping, sharing="last")
    loss(model, x.repeat(3, 1, 1), y.repeat(3)).backward()
    w = fresh_weights(preconditioner).double().view(2, 3, 4)
    preconditioner.step()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert torch.isfinite(preconditioner.rho).all()
    torch.testing.assert_close(w.mean(dim=(1, 2)), torch.ones(2, dtype=torch.float64), rtol=1e-5, atol=0)
    tolerance = {torch.float32: 1e-6 / damping, torch.float64: 1e-13 / damping}[dtype]
    assert (w - w.mean(dim=1, keepdim=True)).abs().max() < tolerance


@pytest.mark.parametrize("x", [torch.zeros(0, FEATURES), torch.zeros(0, 3, FEATURES), torch.zeros(4, 0, FEATURES)])
def test_empty_batches_pass_through(x: Tensor) -> None:
    model = net()
    preconditioner = FNGDPreconditioner(model)
    model.fc1(x.double()).sum().backward()
    model(x.double()).nansum().backward()
    preconditioner.step()
    assert torch.equal(model.fc1.weight.grad, torch.zeros_like(model.fc1.weight))


# Steps, phases and batches -------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_accumulation_sums_the_preconditioned_gradients(micro_batches: int) -> None:
    model = net()
    batches = [data(5 + k, 3, seed=k) for k in range(micro_batches)]
    expected = [dense(model, x, y, 0.01) for x, y in batches]
    preconditioner = FNGDPreconditioner(model, damping=0.01, sharing="replay")
    for x, y in batches:
        (loss(model, x, y) / micro_batches).backward()
    preconditioner.step()
    for place, name in enumerate(LAYER_NAMES):
        total = sum(exact[name].natural_gradient() for exact in expected) / micro_batches
        assert relative_error(gradient(model.get_submodule(name)), total) < 1e-9
        rho = torch.stack([exact[name].rho for exact in expected]).mean()
        torch.testing.assert_close(preconditioner.rho[place], rho)
    assert preconditioner.policy.recorded == micro_batches
    assert preconditioner.phase.steps == 1


def test_each_backward_uses_the_batch_of_its_own_forward() -> None:
    model, batches = net(), [data(7, seed=1), data(5, 3, seed=2)]
    expected = [dense(model, x, y, 0.01) for x, y in batches]
    FNGDPreconditioner(model, damping=0.01)
    losses = [loss(model, x, y) for x, y in batches]
    for each in losses:
        each.backward()
    for name in LAYER_NAMES:
        total = sum(exact[name].natural_gradient() for exact in expected)
        assert relative_error(gradient(model.get_submodule(name)), total) < 1e-9


def with_weights(model: nn.Module, x: Tensor, y: Tensor, w: Tensor) -> dict[str, Tensor]:
    """``sum_n w_n h_n`` of both layers, from the oracle's per-sample gradients."""
    exact = dense(model, x, y, 1.0)
    return {name: exact[name].u @ w[place] / len(x) for place, name in enumerate(LAYER_NAMES)}


@pytest.mark.parametrize("size", [3, 7, 9])
def test_a_shared_step_applies_the_stored_weights_whatever_its_batch_size(size: int) -> None:
    model, (x, y) = net(), data(size, 3, seed=4)
    plain = copy.deepcopy(model)
    preconditioner = FNGDPreconditioner(model, damping=0.01, sharing="last", refresh=0, coefficient_steps=1)
    loss(model, *data(7, 3)).backward()
    preconditioner.step()
    model.zero_grad()
    stored = preconditioner.policy.row
    loss(model, x, y).backward()
    w = stored[:, torch.arange(size) % 7]
    mean = w.mean(dim=1, keepdim=True)
    divisor = mean.clamp(min=0.5)  # beyond a factor of 2 the mean becomes 1 by a shift
    expected = with_weights(plain, x, y, w / divisor + 1 - mean / divisor)
    for name in LAYER_NAMES:
        assert relative_error(gradient(model.get_submodule(name)), expected[name]) < 1e-9
    assert preconditioner.coverage().missed == {}


@pytest.mark.parametrize("sharing", policy_names())
def test_a_last_batch_of_another_size_trains(sharing: str) -> None:
    model = net()
    optimizer = FNGD(model, sharing=sharing, refresh=3)
    for step, size in enumerate([8, 8, 3] * 3):
        x, y = data(size, 3, seed=step)
        index = {INDEX_COLUMN: torch.arange(size) + step} if sharing == "index" else {}
        optimizer.zero_grad()
        F.cross_entropy(model(x, **index), y).backward()
        optimizer.step()
        if step % 3 == 2:
            optimizer.end_epoch()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert optimizer.coverage().missed == {}


class Weights(SharingPolicy):
    """Remembers the places that it was asked for."""

    name = "weights"

    def __init__(self) -> None:
        self.looked_up: list[int] = []
        self.committed: list[int] = []

    def lookup(self, batch: Any) -> None:
        self.looked_up.append(batch.place)

    def commit(self, w: Tensor, valid: Tensor, batch: Any) -> None:
        self.committed.append(batch.place)


def test_places_count_micro_batches_since_the_epoch_or_the_phase_began() -> None:
    model, policy = net(), Weights()
    preconditioner = FNGDPreconditioner(model, sharing=policy, refresh=3, coefficient_steps=5)
    for step in range(10):
        for _ in range(2):
            loss(model, *data(4)).backward()
        preconditioner.step()
        if step == 8:
            preconditioner.end_epoch()
    assert preconditioner.phase.shared_since == 5
    assert policy.committed == [*range(10), 4, 5]  # steps 0 to 4, and the refresh in step 7
    assert policy.looked_up == [0, 1, 2, 3, 6, 7, 0, 1]


def test_forwards_without_a_backward_count_for_nothing() -> None:
    model, policy = net(), Weights()
    preconditioner = FNGDPreconditioner(model, sharing=policy, coefficient_steps=100)
    for _ in range(3):
        model(data(4)[0])
        loss(model, *data(4)).backward()
        preconditioner.step()
    preconditioner.step()
    assert policy.committed == [0, 1, 2]
    assert preconditioner.phase.steps == 3


def test_a_forgotten_step_is_an_error_and_unused_forwards_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_fngd.window._LIMIT", 5)
    model, (x, y) = net(), data(4)
    FNGDPreconditioner(model)
    for _ in range(20):
        model(x)
    for _ in range(5):
        loss(model, x, y).backward()
    with pytest.raises(RuntimeError, match=r"call preconditioner.step\(\) after each optimizer.step\(\)"):
        model(x)


def test_following_an_optimizer_closes_its_steps() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    preconditioner = FNGDPreconditioner(model, coefficient_steps=2)
    preconditioner.follow(optimizer)
    for _ in range(3):
        loss(model, *data(4)).backward()
        optimizer.step()
    assert preconditioner.phase.steps == 3
    assert preconditioner.phase.sharing
    loss(model, *data(4)).backward()
    preconditioner.detach()
    optimizer.step()
    assert preconditioner.phase.steps == 3
    assert not optimizer._optimizer_step_post_hooks


def test_shared_steps_use_a_running_geometric_mean_of_the_ratio() -> None:
    model = net()
    preconditioner = FNGDPreconditioner(model, refresh=2, coefficient_steps=2)
    fresh, mean = [], torch.zeros(2, dtype=torch.float64)
    for step in range(6):
        computes = preconditioner.phase.computes
        loss(model, *data(7, seed=step)).backward()
        preconditioner.step()
        if computes:
            fresh.append(preconditioner.rho.log())
            mean = fresh[0] if len(fresh) == 1 else 0.8 * mean + 0.2 * fresh[-1]
        else:
            torch.testing.assert_close(preconditioner.rho.log(), mean)
    assert len(fresh) == 4


def test_the_index_column_never_reaches_the_model() -> None:
    model, (x, y) = net(), data(4)
    preconditioner = FNGDPreconditioner(model, sharing="ranked")
    F.cross_entropy(model(x, **{INDEX_COLUMN: torch.arange(4)}), y).backward()
    model.eval()(x, **{INDEX_COLUMN: torch.arange(4)})
    preconditioner.detach()
    with pytest.raises(TypeError, match=INDEX_COLUMN):
        model(x, **{INDEX_COLUMN: torch.arange(4)})


def test_index_sharing_without_the_column_is_an_error_that_names_it() -> None:
    model, (x, _) = net(), data(4)
    FNGDPreconditioner(model, sharing="index")
    with pytest.raises(ValueError, match=r"'fngd_index' in every training batch: train on hf_fngd.add_index"):
        model(x)
    model.eval()(x)


def test_index_sharing_follows_the_samples() -> None:
    model, (x, y) = net(), data(7, 3)
    plain = copy.deepcopy(model)
    preconditioner = FNGDPreconditioner(model, sharing=IndexSharing(7), refresh=0, coefficient_steps=1, damping=0.01)
    F.cross_entropy(model(x, **{INDEX_COLUMN: torch.arange(7)}), y).backward()
    w = fresh_weights(preconditioner)
    preconditioner.step()
    model.zero_grad()
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    F.cross_entropy(model(x[order], **{INDEX_COLUMN: order}), y[order]).backward()
    expected = with_weights(plain, x[order], y[order], w[:, order])
    for name in LAYER_NAMES:
        assert relative_error(gradient(model.get_submodule(name)), expected[name]) < 1e-9


class ByKey(nn.Module):
    """Takes its batch as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, position: Any = None, input_ids: Any = None, batch: Any = None) -> Tensor:
        tokens = batch["input_ids"] if batch is not None else input_ids if input_ids is not None else position
        return self.fc(self.embedding(tokens))


TOKENS = torch.arange(12).view(6, 2) % 9
INPUTS = {
    "positional": ((TOKENS,), {}),
    "keyword": ((), {"input_ids": TOKENS}),
    "keyword before others": ((torch.zeros(2, 2),), {"input_ids": TOKENS}),
    "mapping": ((), {"batch": {"input_ids": TOKENS}}),
    "scalar first": ((torch.tensor(1.0),), {"input_ids": TOKENS}),
}


@pytest.mark.parametrize(("args", "kwargs"), INPUTS.values(), ids=INPUTS)
def test_the_batch_is_found_among_the_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    model = ByKey()
    preconditioner = FNGDPreconditioner(model)
    model(*args, **kwargs).square().sum().backward()
    assert preconditioner._window._batches[0].info.size == 6
    preconditioner.step()
    assert preconditioner.coverage().missed == {}


def test_a_model_without_tensor_inputs_gets_plain_gradients() -> None:
    model = ByKey()
    preconditioner = FNGDPreconditioner(model)
    model.forward = lambda: model.fc(model.embedding(TOKENS))
    model().sum().backward()
    preconditioner.step()
    assert set(preconditioner.coverage().missed.values()) == {NEVER_CALLED}


# Layers that cannot be preconditioned --------------------------------------------------------------------


class Twice(Net):
    """Calls its first layer twice."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.fc2(torch.tanh(self.fc1(-x)))


class Folded(Net):
    """Folds positions into the batch before its second layer, as OPT does."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.fc1(x)))
        return self.fc2(hidden.flatten(0, 1)).view(*hidden.shape[:2], CLASSES).mean(1)


class Unused(Net):
    """Never calls its second layer."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.norm(self.fc1(x))), self.fc2.weight, self.fc2.bias)


OBSTACLES: dict[str, tuple[type[Net], tuple[int, ...], dict[str, str]]] = {
    "called twice": (Twice, (), {"fc1": CALLED_AGAIN, "fc2": CALLED_AGAIN}),
    "folded": (Folded, (3,), {"fc2": NOT_THE_BATCH}),
    "unused": (Unused, (), {"fc2": NEVER_CALLED}),
}


@pytest.mark.parametrize(("model_type", "between", "reasons"), OBSTACLES.values(), ids=OBSTACLES)
@pytest.mark.parametrize("refresh", [0, 1])
def test_layers_that_cannot_be_preconditioned_get_plain_gradients_and_a_report(
    model_type: type[Net],
    between: tuple[int, ...],
    reasons: dict[str, str],
    refresh: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    model = model_type().double()
    x, y = data(7, *between)
    # The layers above get plain or preconditioned gradients: neither changes what flows down.
    plain = torch.autograd.grad(loss(model, x, y), list(model.parameters()))
    expected = dict(zip((name for name, _ in model.named_parameters()), plain, strict=True))
    preconditioner = FNGDPreconditioner(model, damping=0.01, refresh=refresh, coefficient_steps=1)
    for _ in range(3):
        model.zero_grad()
        with caplog.at_level(logging.WARNING, logger="hf_fngd"):
            loss(model, x, y).backward()
            preconditioner.step()
        for layer in ("fc1", "fc2"):
            found = model.get_submodule(layer).weight.grad
            assert torch.allclose(found, expected[f"{layer}.weight"], rtol=1e-10) == (layer in reasons)
    report = preconditioner.coverage()
    assert report.missed == {
        f"{layer}.{leaf}": reason for layer, reason in reasons.items() for leaf in ("weight", "bias")
    }
    (record,) = caplog.records  # once, not in every step
    for reason in reasons.values():
        assert reason in record.getMessage()


@pytest.mark.parametrize(("model_type", "between", "reasons"), OBSTACLES.values(), ids=OBSTACLES)
def test_strict_raises_in_the_first_step(
    model_type: type[Net], between: tuple[int, ...], reasons: dict[str, str]
) -> None:
    model = model_type().double()
    preconditioner = FNGDPreconditioner(model, strict=True)
    loss(model, *data(7, *between)).backward()
    with pytest.raises(RuntimeError, match=r"(?s)strict=True: .*exclude_modules"):
        preconditioner.step()
    preconditioner.detach()
    others = [layer for layer in LAYER_NAMES if layer not in reasons]
    if others:
        preconditioner = FNGDPreconditioner(model, strict=True, exclude_modules=sorted(reasons))
        loss(model, *data(7, *between)).backward()
        preconditioner.step()


class Later(Net):
    """Calls its first layer twice once it is told to."""

    twice = False

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + self.fc1(x).sum() if self.twice else y


@pytest.mark.parametrize("strict", [False, True])
def test_what_goes_wrong_later_is_told_then(strict: bool, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, (x, y) = Later().double(), data(7)
    preconditioner = FNGDPreconditioner(model, strict=strict)
    for _ in range(2):
        loss(model, x, y).backward()
        preconditioner.step()
    assert not caplog.records
    model.twice = True
    loss(model, x, y).backward()
    if strict:
        with pytest.raises(RuntimeError, match=CALLED_AGAIN):
            preconditioner.step()
        return
    preconditioner.step()
    loss(model, x, y).backward()
    preconditioner.step()
    (record,) = caplog.records
    assert CALLED_AGAIN in record.getMessage()
    assert "fc2" not in record.getMessage()


def test_the_report_tells_what_became_of_every_parameter() -> None:
    model = net()
    preconditioner = FNGDPreconditioner(model, exclude_modules="fc1")
    before = preconditioner.coverage()
    loss(model, *data(4)).backward()
    preconditioner.step()
    report = preconditioner.coverage()
    assert before == report
    assert report.preconditioned == ("fc2.weight", "fc2.bias")
    assert report.plain == {
        "fc1.weight": "among exclude_modules",
        "fc1.bias": "among exclude_modules",
        "norm.weight": "LayerNorm is not a preconditioned layer type",
        "norm.bias": "LayerNorm is not a preconditioned layer type",
    }
    assert report.missed == {}
    assert str(report).splitlines() == [
        "FNGD preconditions 2 parameters.",
        "  2 plain gradient: among exclude_modules (fc1.weight, fc1.bias)",
        "  2 plain gradient: LayerNorm is not a preconditioned layer type (norm.weight, norm.bias)",
    ]


# Other ways to run a model -------------------------------------------------------------------------------


class Checkpointed(Net):
    """Recomputes its first layers in the backward pass."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(lambda x: torch.tanh(self.norm(self.fc1(x))), x, use_reentrant=self.reentrant)
        return checkpoint(self.fc2, hidden, use_reentrant=self.reentrant).mean(1)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradient(reentrant: bool, shared: bool) -> None:
    found = []
    for model_type in (Net, Checkpointed):
        torch.manual_seed(0)
        model = model_type().double()
        model.reentrant = reentrant
        preconditioner = FNGDPreconditioner(model, damping=0.01, coefficient_steps=1, refresh=0)
        for _ in range(1 + shared):
            model.zero_grad()
            x, y = data(7, 3)
            loss(model, x.requires_grad_(), y).backward()
            preconditioner.step()
        assert preconditioner.coverage().missed == {}
        found.append(gradients(model))
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("layer_type", ["Linear", "Conv1D"])
@pytest.mark.parametrize("shared", [False, True])
def test_autocast_preconditions_in_bfloat16(layer_type: str, shared: bool) -> None:
    found = []
    for enabled in (True, False):
        model = net(dtype=torch.float32, layer_type=layer_type)
        preconditioner = FNGDPreconditioner(model, damping=0.1, coefficient_steps=1, refresh=0)
        for _ in range(1 + shared):
            model.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                value = loss(model, *data(7, 3, dtype=torch.float32))
            value.backward()
            preconditioner.step()
        assert preconditioner.coverage().missed == {}
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
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
    preconditioner = FNGDPreconditioner(model, damping=0.1, sharing="last")
    loss(model, x, y).backward()
    assert fresh_weights(preconditioner).dtype == torch.float32
    for place, name in enumerate(LAYER_NAMES):
        assert model.get_submodule(name).weight.grad.dtype == dtype
        assert relative_error(fresh_weights(preconditioner)[place].double(), exact[name].w) < 0.05


# Construction and state ----------------------------------------------------------------------------------


def submodule_of(model: Net) -> nn.Module:
    return model.fc1


def parent_of(model: Net) -> nn.Module:
    return nn.Sequential(model)


SECOND: dict[str, tuple[Callable[[Net], nn.Module], dict[str, Any], dict[str, Any]]] = {
    "same model": (lambda model: model, {}, {}),
    "other layers": (lambda model: model, {"target_modules": ["fc1"]}, {"target_modules": ["fc2"]}),
    "some layers": (lambda model: model, {"target_modules": ["fc2"]}, {}),
    "submodule": (submodule_of, {}, {}),
    "parent": (parent_of, {}, {}),
}


@pytest.mark.parametrize(("choose", "first", "second"), SECOND.values(), ids=SECOND)
def test_a_second_preconditioner_is_refused_and_changes_nothing(
    choose: Callable[[Net], nn.Module], first: dict[str, Any], second: dict[str, Any]
) -> None:
    model = net()
    FNGDPreconditioner(model, **first)
    other = choose(model)
    types = [type(module) for module in other.modules()]
    with pytest.raises(RuntimeError, match=r"attached to another FNGD already; call hf_fngd.detach\(model\) first"):
        FNGDPreconditioner(other, **second)
    assert [type(module) for module in other.modules()] == types


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"damping": 0}, ValueError, "damping must be"),
        ({"damping": "0.1"}, TypeError, "damping must be"),
        ({"sharing": "sometimes"}, ValueError, "sharing must be one of 'index', 'last'"),
        ({"refresh": -1}, ValueError, "refresh must be"),
        ({"coefficient_steps": 0}, ValueError, "coefficient_steps must be"),
        ({"memory_budget": 0}, ValueError, "memory_budget must be"),
        ({"target_modules": ["fc3"]}, ValueError, "'fc3', which is no module"),
        ({"strict": 1}, TypeError, "strict must be"),
    ],
)
def test_bad_arguments_are_refused_and_leave_the_model_alone(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = net()
    with pytest.raises(error, match=message):
        FNGDPreconditioner(model, **arguments)
    assert type(model) is Net
    assert type(model.fc1) is nn.Linear


@pytest.mark.parametrize("model", [[torch.ones(2)], None, "model"])
def test_something_else_than_a_model_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match=r"is the model, a torch.nn.Module, got .*FNGDFactory"):
        FNGDPreconditioner(model)


def test_the_preconditioner_does_not_keep_its_model_alive() -> None:
    preconditioner = FNGDPreconditioner(net())
    gc.collect()
    with pytest.raises(ReferenceError, match="no longer exists"):
        _ = preconditioner.model
    preconditioner.detach()


def train(model: nn.Module, preconditioner: FNGDPreconditioner, seeds: range) -> list[Tensor]:
    """A few steps at fixed parameters; the gradients of the last one."""
    for seed in seeds:
        model.zero_grad()
        x, y = data(6, 3, seed=seed)
        F.cross_entropy(model(x, **{INDEX_COLUMN: torch.arange(6) + seed}), y).backward()
        preconditioner.step()
    return gradients(model)


@pytest.mark.parametrize("steps", [0, 2, 5])
@pytest.mark.parametrize("sharing", policy_names())
def test_a_resumed_preconditioner_goes_on_as_it_would_have(sharing: str, steps: int) -> None:
    made = [
        (model, FNGDPreconditioner(model, sharing=sharing, refresh=4, coefficient_steps=3)) for model in (net(), net())
    ]
    (model, preconditioner), (other, resumed) = made
    if steps:
        train(model, preconditioner, range(steps))
    file = io.BytesIO()
    torch.save(preconditioner.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for more in range(steps, steps + 5):
        expected, found = (train(*each, range(more, more + 1)) for each in ((model, preconditioner), (other, resumed)))
        assert all(torch.equal(p, q) for p, q in zip(found, expected, strict=True))
        assert torch.equal(resumed.rho, preconditioner.rho)


def test_loading_drops_a_half_done_step() -> None:
    model = net()
    preconditioner = FNGDPreconditioner(model)
    state = copy.deepcopy(preconditioner.state_dict())
    loss(model, *data(6)).backward()
    preconditioner.load_state_dict(state)
    preconditioner.step()
    assert preconditioner.phase.steps == 0


def test_the_state_of_another_policy_is_refused() -> None:
    state = FNGDPreconditioner(net(), sharing="last").state_dict()
    with pytest.raises(ValueError, match="made with sharing='last', this optimizer has sharing='ranked'"):
        FNGDPreconditioner(net(), sharing="ranked").load_state_dict(state)


def test_diagnostics_say_what_a_user_wants_to_see() -> None:
    model, (x, y) = net(), data(7, 3)
    exact = dense(model, x, y, 0.01)
    preconditioner = FNGDPreconditioner(model, damping=0.01, coefficient_steps=2)
    before = preconditioner.diagnostics()
    assert before.pop("rho") != before.get("rho")  # nan
    assert before == {"phase": 0.0, "weight_spread": 0.0}
    loss(model, x, y).backward()
    preconditioner.step()
    found = preconditioner.diagnostics()
    rho = torch.stack([exact[name].rho for name in LAYER_NAMES])
    variance = torch.stack([exact[name].w.var(correction=0) for name in LAYER_NAMES])
    assert found == pytest.approx(
        {"phase": 0.0, "rho": float(rho.prod().sqrt()), "weight_spread": float(variance.mean().sqrt())}
    )
    loss(model, x, y).backward()
    preconditioner.step()
    assert preconditioner.diagnostics()["phase"] == 1.0


# An engine that nothing reaches --------------------------------------------------------------------------


def test_training_in_evaluation_mode_is_reported() -> None:
    model = net().eval()
    preconditioner = FNGDPreconditioner(model)
    loss(model, *data(6, 3)).backward()
    preconditioner.step()
    assert set(preconditioner.coverage().missed.values()) == {NEVER_CALLED}
    preconditioner.detach()

    strict = FNGDPreconditioner(model, strict=True)
    loss(model, *data(6, 3)).backward()
    with pytest.raises(RuntimeError, match="strict=True"):
        strict.step()


def test_a_forward_of_the_instances_own_is_refused_and_leaves_the_model_alone() -> None:
    model = net()
    model.fc2.forward = lambda x: x
    with pytest.raises(RuntimeError, match="build FNGD before the model is prepared"):
        FNGDPreconditioner(model)
    assert type(model.fc1) is type(net().fc1)
    del model.fc2.forward
    FNGDPreconditioner(model)


def test_a_retained_graph_gives_the_same_gradients_again() -> None:
    model, (x, y) = net(), data(6, 3)
    preconditioner = FNGDPreconditioner(model, sharing="never", damping=0.01)
    value = loss(model, x, y)
    value.backward(retain_graph=True)
    first = gradient(model.fc1).clone()
    value.backward()
    torch.testing.assert_close(gradient(model.fc1), 2 * first)
    preconditioner.step()
    assert preconditioner.coverage().missed == {}


def test_detaching_a_second_time_leaves_another_preconditioner_alone() -> None:
    model = net()
    first = FNGDPreconditioner(model)
    detach(model)
    second = FNGDPreconditioner(model, sharing="never")
    first.detach()
    loss(model, *data(6, 3)).backward()
    assert second._window._batches[0].complete
