"""The engine over many steps: accumulation, phases, places, which samples a batch holds, construction."""

import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fngd import FNGD, FNGDPreconditioner
from hf_fngd.coverage import NEVER_CALLED
from hf_fngd.sharing import INDEX_COLUMN, IndexSharing, SharingPolicy, policy_names
from tests.nets import LAYER_NAMES, Net, data, dense, fresh_weights, gradient, loss, net, relative_error

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
        torch.testing.assert_close(preconditioner.rho[place], rho)
    assert preconditioner.policy.recorded == micro_batches
    assert preconditioner.phase.steps == 1


def test_each_backward_uses_the_batch_of_its_own_forward() -> None:
    model, batches = net(), [data(7, seed=1), data(5, 3, seed=2)]
    expected = [dense(model, x, y, 0.01) for x, y in batches]
    FNGDPreconditioner(model, sharing="ranked", damping=0.01)
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
    preconditioner = FNGDPreconditioner(model, sharing="ranked", coefficient_steps=2)
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


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_loss_scaler_skipped_does_not_count(fused: bool) -> None:
    # A fused optimizer's own step is called even then.
    model = net().float()
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    preconditioner = FNGDPreconditioner(model, sharing="replay", coefficient_steps=9)
    preconditioner.follow(optimizer)
    scaler, counted = torch.amp.GradScaler("cpu", init_scale=4.0), []
    for factor in (1.0, float("inf"), float("inf"), 1.0):
        x, y = data(4)
        scaler.scale(factor * loss(model, x.float(), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        counted.append((preconditioner.phase.steps, preconditioner.state_dict()["place"]))
    assert counted == [(1, 1), (1, 1), (1, 1), (2, 2)]


def test_shared_steps_use_a_running_geometric_mean_of_the_ratio() -> None:
    model = net()
    preconditioner = FNGDPreconditioner(model, sharing="ranked", refresh=2, coefficient_steps=2)
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


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("sharing", policy_names())
def test_a_batch_that_is_not_finite_leaves_store_and_ratio_alone(sharing: str, value: float) -> None:
    model, (x, y) = net(), data(7, 3)
    index = {INDEX_COLUMN: torch.arange(7)} if sharing == "index" else {}
    preconditioner = FNGDPreconditioner(model, sharing=sharing, coefficient_steps=100)
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
            assert torch.equal(torch.as_tensor(after["policy"][key]), torch.as_tensor(stored))


def test_diagnostics_say_what_a_user_wants_to_see() -> None:
    model, (x, y) = net(), data(7, 3)
    exact = dense(model, x, y, 0.01)
    preconditioner = FNGDPreconditioner(model, sharing="ranked", damping=0.01, coefficient_steps=2)
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


def test_a_loaded_state_is_told_of_at_once() -> None:
    models = [net(), net()]
    old, new = (FNGDPreconditioner(model, sharing="ranked", coefficient_steps=1) for model in models)
    for seed in (1, 2):
        loss(models[0], *data(7, 3, seed=seed)).backward()
        old.step()
    new.load_state_dict(old.state_dict())
    assert new.diagnostics() == old.diagnostics()
    assert new.diagnostics()["weight_spread"] > 0


# Which samples a batch holds -------------------------------------------------------------------------------


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


# Construction ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"damping": 0}, ValueError, "damping must be"),
        ({"damping": "0.1"}, TypeError, "damping must be"),
        ({"sharing": "sometimes"}, ValueError, "sharing must be one of 'clipped', 'index'"),
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


def test_an_optimizer_of_another_model_is_not_followed() -> None:
    model = net()
    preconditioner = FNGDPreconditioner(model)
    with pytest.raises(ValueError, match="this SGD has no parameter of the preconditioner's model"):
        preconditioner.follow(torch.optim.SGD(net().parameters(), lr=0.1))
