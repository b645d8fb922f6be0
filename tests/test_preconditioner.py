"""The engine over many steps: accumulation, phases, places, which samples a batch holds, construction."""

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_fngd import FNGD, FNGDPreconditioner, policy_names
from hf_fngd.distributed.exchange import Measurement
from hf_fngd.engine.coverage import NEVER_CALLED
from hf_fngd.weights.replay import ReplaySharing
from tests.nets import LAYER_NAMES, Watched, data, dense, gradient, loss, net, relative_error

# Steps and phases ------------------------------------------------------------------------------------------


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
        torch.testing.assert_close(preconditioner.policy.rho[place], rho)
    state = preconditioner.state_dict()["policy"]
    assert (len(state["rows"]), state["steps"]) == (micro_batches, 1)


def test_each_backward_uses_the_batch_of_its_own_forward() -> None:
    model, batches = net(), [data(7, seed=1), data(5, 3, seed=2)]
    expected = [dense(model, x, y, 0.01) for x, y in batches]
    FNGDPreconditioner(model, sharing="never", damping=0.01)
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
    preconditioner = FNGDPreconditioner(model, damping=0.01, sharing="replay", coefficient_steps=1)
    loss(model, *data(7, 3)).backward()
    preconditioner.step()
    model.zero_grad()
    (stored,) = preconditioner.state_dict()["policy"]["rows"]
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
    optimizer = FNGD(model, sharing=sharing)
    for step, size in enumerate([8, 8, 3] * 3):
        optimizer.zero_grad()
        loss(model, *data(size, 3, seed=step)).backward()
        optimizer.step()
        if step % 3 == 2:
            optimizer.end_epoch()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert optimizer.coverage().missed == {}


class Places(ReplaySharing):
    """Remembers the places that it was asked for."""

    def __init__(self) -> None:
        self.looked_up: list[int] = []
        self.stored: list[int] = []

    def lookup(self, size: int, place: int) -> Tensor | None:
        self.looked_up.append(place)
        return super().lookup(size, place)

    def store(self, measurement: Measurement) -> None:
        self.stored.append(measurement.place)
        super().store(measurement)


def test_places_count_micro_batches_since_the_epoch_or_the_shared_steps_began() -> None:
    model, policy = net(), Places()
    preconditioner = FNGDPreconditioner(model, sharing=policy, coefficient_steps=5)
    for step in range(10):
        for _ in range(2):
            loss(model, *data(4)).backward()
        preconditioner.step()
        if step == 8:
            preconditioner.end_epoch()
    assert policy.shared_since == 5
    assert policy.stored == [*range(10)]
    assert policy.looked_up == [*range(8), 0, 1]


def test_forwards_without_a_backward_count_for_nothing() -> None:
    model, policy = net(), Places()
    preconditioner = FNGDPreconditioner(model, sharing=policy)
    for _ in range(3):
        model(data(4)[0])
        loss(model, *data(4)).backward()
        preconditioner.step()
    preconditioner.step()
    assert policy.stored == [0, 1, 2]
    assert policy.steps == 3


def test_a_forgotten_step_is_an_error_and_unused_forwards_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_fngd.engine.window._LIMIT", 5)
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
    preconditioner = FNGDPreconditioner(model, sharing="replay", coefficient_steps=2)
    policy = preconditioner.policy
    preconditioner.follow(optimizer)
    for _ in range(3):
        loss(model, *data(4)).backward()
        optimizer.step()
    assert (policy.steps, policy.shared_since) == (3, 2)
    loss(model, *data(4)).backward()
    preconditioner.detach()
    optimizer.step()
    assert policy.steps == 3
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_loss_scaler_skipped_does_not_count(fused: bool) -> None:
    # A fused optimizer's own step is called even then.
    model = net().float()
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    preconditioner = FNGDPreconditioner(model, sharing="replay")
    preconditioner.follow(optimizer)
    scaler, counted = torch.amp.GradScaler("cpu", init_scale=4.0), []
    for factor in (1.0, float("inf"), float("inf"), 1.0):
        x, y = data(4)
        scaler.scale(factor * loss(model, x.float(), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        counted.append((preconditioner.policy.steps, preconditioner.policy.place))
    assert counted == [(1, 1), (1, 1), (1, 1), (2, 2)]


def test_shared_steps_use_a_running_geometric_mean_of_the_ratio() -> None:
    model = net()
    preconditioner = FNGDPreconditioner(model, sharing="replay", coefficient_steps=3)
    fresh, mean = [], torch.zeros(2, dtype=torch.float64)
    for step in range(5):
        loss(model, *data(7, seed=step)).backward()
        preconditioner.step()
        if step < 3:
            fresh.append(preconditioner.policy.rho.log())
            mean = fresh[0] if len(fresh) == 1 else 0.8 * mean + 0.2 * fresh[-1]
        else:
            torch.testing.assert_close(preconditioner.policy.rho.log(), mean)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("sharing", policy_names())
def test_a_batch_that_is_not_finite_leaves_store_and_ratio_alone(sharing: str, value: float) -> None:
    model, (x, y) = net(), data(7, 3)
    preconditioner = FNGDPreconditioner(model, sharing=sharing)
    loss(model, x, y).backward()
    preconditioner.step()
    before = copy.deepcopy(preconditioner.state_dict()["policy"])
    rho = preconditioner.policy.rho.clone() if preconditioner.policy.solves else None
    spoilt = x.clone()
    spoilt[2] = value
    loss(model, spoilt, y).backward()
    preconditioner.step()
    after = preconditioner.state_dict()["policy"]
    assert rho is None or torch.equal(preconditioner.policy.rho, rho)
    if "rows" in before:  # the spoilt batch has a row of its own
        before["rows"] = torch.cat([before["rows"], torch.ones_like(before["rows"])])
    for key in before.keys() - {"place", "steps"}:
        assert str(after[key]) == str(before[key]), key


def test_diagnostics_say_what_a_user_wants_to_see() -> None:
    model, (x, y) = net(), data(7, 3)
    exact = dense(model, x, y, 0.01)
    preconditioner = FNGDPreconditioner(model, sharing="replay", damping=0.01, coefficient_steps=2)
    assert preconditioner.diagnostics() == {"phase": 0.0, "weight_spread": 0.0}
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
    names = {"clipped": {"weight_spread"}, "uniform": set(), "never": {"weight_spread"}}
    for sharing, expected in names.items():
        assert set(FNGDPreconditioner(net(), sharing=sharing).diagnostics()) == expected


# Which samples a batch holds -------------------------------------------------------------------------------


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
    model, policy = ByKey(), Watched()
    preconditioner = FNGDPreconditioner(model, sharing=policy)
    model(*args, **kwargs).square().sum().backward()
    assert policy.batch.size == 6
    preconditioner.step()
    assert preconditioner.coverage().missed == {}


def test_a_model_without_tensor_inputs_gets_plain_gradients() -> None:
    model = ByKey()
    preconditioner = FNGDPreconditioner(model)
    model.forward = lambda: model.fc(model.embedding(TOKENS))
    model().sum().backward()
    preconditioner.step()
    assert set(preconditioner.coverage().missed.values()) == {NEVER_CALLED}


# Construction ----------------------------------------------------------------------------------------------


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


def test_an_optimizer_of_another_model_is_not_followed() -> None:
    model = net()
    preconditioner = FNGDPreconditioner(model)
    with pytest.raises(ValueError, match="this SGD has no parameter of the preconditioner's model"):
        preconditioner.follow(torch.optim.SGD(net().parameters(), lr=0.1))
