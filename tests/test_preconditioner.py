"""The engine over many steps: accumulation, phases, places, which samples a batch holds, construction."""

import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fngd import FNGDPreconditioner, policy_names
from hf_fngd.engine.reasons import NO_BATCH
from tests.nets import LAYER_NAMES, data, loss, net
from tests.steps import Watched, dense, gradient, one_step, relative_error, with_engine, with_fngd

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
    assert (rows(preconditioner), preconditioner.policy.steps) == (micro_batches, 1)


def test_each_backward_uses_the_batch_of_its_own_forward() -> None:
    model, batches = net(), [data(7, seed=1), data(5, 3, seed=2)]
    expected = [dense(model, x, y, 0.01) for x, y in batches]
    _kept = FNGDPreconditioner(model, sharing="never", damping=0.01)
    losses = [loss(model, x, y) for x, y in batches]
    for each in losses:
        each.backward()
    for name in LAYER_NAMES:
        total = sum(exact[name].natural_gradient() for exact in expected)
        assert relative_error(gradient(model.get_submodule(name)), total) < 1e-9


def rows(preconditioner: FNGDPreconditioner) -> int:
    """How many micro-batches' sample weights are stored."""
    return len(preconditioner.state_dict()["policy"]["rows"])


def test_micro_batches_that_share_a_backward_pass_are_told_apart() -> None:
    """Coefficient steps and shared ones equal those with a backward pass for each."""
    found = []
    for together in (True, False):
        model, optimizer = with_fngd(sharing="replay", lr=1e-2, damping=0.01, coefficient_steps=2)
        for step in range(6):
            losses = [loss(model, *data(6, 4, seed=10 * step + part)) for part in range(2)]
            for each in [sum(losses)] if together else losses:
                each.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert rows(optimizer.preconditioner) == 4
        found.append(list(model.parameters()))
    torch.testing.assert_close(*found)


def test_forwards_without_a_backward_count_for_nothing() -> None:
    model, preconditioner = with_engine(sharing="replay")
    for _ in range(3):
        model(data(4)[0])
        loss(model, *data(4)).backward()
        preconditioner.step()
    preconditioner.step()
    assert (rows(preconditioner), preconditioner.policy.steps) == (3, 3)


def test_accumulation_outside_of_the_parameters_keeps_the_last_micro_batch() -> None:
    """A limit, which `Window.make_room` states."""
    model, preconditioner = with_engine(sharing="replay")
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(loss(model, *data(samples, 4)), parameters) for samples in (6, 5)]
    for p, *parts in zip(parameters, *gradients, strict=True):
        p.grad = sum(parts)
    preconditioner.step()
    assert rows(preconditioner) == 1


@pytest.mark.parametrize("to_none", [True, False])
def test_a_step_that_was_left_out_is_seen_where_gradients_are_cleared(to_none: bool) -> None:
    """As a loss scaler leaves one out."""
    model, preconditioner = with_engine(sharing="replay")
    for _ in range(2):
        model.zero_grad(set_to_none=to_none)
        loss(model, *data(6, 4)).backward()
    preconditioner.step()
    assert rows(preconditioner) == 1


def test_gradients_may_be_cleared_between_forward_and_backward() -> None:
    """As torch's own examples do: a backward pass that was cleared before is none of the step's."""
    (model, replay), (same, clipped) = with_engine(sharing="replay"), with_engine()
    for each, preconditioner in ((model, replay), (same, clipped)):
        for _ in range(3):
            value = loss(each, *data(7))
            each.zero_grad()
            value.backward()
        preconditioner.step()
    assert rows(replay) == 1
    assert clipped.policy.parts == 1


def test_micro_batches_are_kept_where_a_table_alone_is_trained() -> None:
    model, x = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3)).double(), torch.arange(3)[None]
    preconditioner = FNGDPreconditioner(model)
    for step in range(3):
        if step == 1:
            model[2].requires_grad_(False)
        model.zero_grad()
        for n in range(4):
            F.cross_entropy(model((x + n) % 9), torch.tensor([n % 3])).backward()
        preconditioner.step()
        assert preconditioner.policy.parts == 4


def test_a_forward_pass_may_change_weights_itself() -> None:
    """As one does that bounds their norms."""
    model, preconditioner = with_engine()

    def bound(module: nn.Module, _: Any) -> None:
        with torch.no_grad():
            module.weight.div_(module.weight.norm(dim=1, keepdim=True).clamp(min=0.5))

    model.fc1.register_forward_pre_hook(bound)
    for _ in range(4):
        loss(model, *data(2)).backward()
    preconditioner.step()
    assert preconditioner.policy.parts == 4


def test_a_forgotten_step_is_an_error_and_unused_forwards_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_fngd.engine.window._LIMIT", 5)
    model, (x, y) = net(), data(4)
    _kept = FNGDPreconditioner(model)
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


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("sharing", policy_names())
def test_a_batch_that_is_not_finite_leaves_store_and_ratio_alone(sharing: str, value: float) -> None:
    (model, preconditioner), (x, y) = with_engine(sharing=sharing), data(7, 3)
    one_step(model, preconditioner, x, y)
    before = copy.deepcopy(preconditioner.state_dict()["policy"])
    rho = preconditioner.policy.rho.clone() if preconditioner.policy.solves else None
    spoilt = x.clone()
    spoilt[2] = value
    one_step(model, preconditioner, spoilt, y)
    after = preconditioner.state_dict()["policy"]
    assert rho is None or torch.equal(preconditioner.policy.rho, rho)
    if "rows" in before:  # the spoilt batch has a row of its own
        before["rows"] = torch.cat([before["rows"], torch.ones_like(before["rows"])])
    for key in before.keys() - {"place", "steps"}:
        assert str(after[key]) == str(before[key]), key


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
    assert set(preconditioner.coverage().missed.values()) == {NO_BATCH}


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
    _model, preconditioner = with_engine()
    with pytest.raises(ValueError, match="this SGD has no parameter of the preconditioner's model"):
        preconditioner.follow(torch.optim.SGD(net().parameters(), lr=0.1))
