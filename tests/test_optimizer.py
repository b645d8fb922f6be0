"""FNGD as a whole: trajectories against the slow reference, groups, schedulers, safety, refusals."""

import copy
import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from hf_fngd import FNGD, FNGDConfig, FNGDFactory, policy_names
from tests.nets import LAYER_NAMES, UPDATES_OF, data, loss, net, settings_of
from tests.reference import run
from tests.steps import assert_equal, one_step, parameters, train, with_fngd

RULES = [(update, sharing) for sharing in policy_names() for update in UPDATES_OF[sharing]]

# The trajectory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [4, 2])
@pytest.mark.parametrize("coefficient_steps", [None, 3])
@pytest.mark.parametrize("sharing", ["replay", "never"])
def test_seventeen_steps_are_those_of_the_slow_reference(
    sharing: str, coefficient_steps: int | None, last: int
) -> None:
    sizes = [6, 6, 6, 6, 6, 6, 6, last]  # an epoch, whose last batch is short
    batches = [data(sizes[step % 8], 2, seed=step) for step in range(17)]
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "fallback_lr": 0.02, "damping": 0.01}
    settings |= {"sharing": sharing} | ({"coefficient_steps": coefficient_steps} if sharing == "replay" else {})
    model = net(width=5)
    expected = run(model, LAYER_NAMES, batches, loss, epoch=8, **settings)
    optimizer = FNGD(model, update="momentum", fallback="sgd", **settings)
    for step, (x, y) in enumerate(batches):
        one_step(model, optimizer, x, y)
        if step in (7, 15):
            optimizer.end_epoch()
        torch.testing.assert_close(parameters(model), expected[step], rtol=1e-9, atol=1e-9)
    moved = [(p - q).norm() for p, q in zip(model.parameters(), expected[0], strict=True)]
    assert min(moved) > 1e-3


@pytest.mark.parametrize(("update", "sharing"), RULES)
def test_every_update_and_policy_trains(update: str, sharing: str) -> None:
    model, (x, _) = net(width=16), data(24, 2)
    y = x.mean(dim=1)[:, :4].argmax(dim=1)
    lr = 3e-3 if update == "momentum" else 0.03
    optimizer = FNGD(model, lr=lr, update=update, **settings_of(sharing, damping=0.1, coefficient_steps=4))
    losses = []
    for step in range(60):
        picked = torch.arange(8) + 8 * (step % 3)
        optimizer.zero_grad()
        value = loss(model, x[picked], y[picked])
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


def test_a_closure_is_evaluated_once_and_its_loss_returned() -> None:
    models = [net(), net()]
    optimizers = [FNGD(model) for model in models]
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        optimizers[1].zero_grad()
        value = loss(models[1], *data(6, 3, seed=0))
        value.backward()
        return value

    expected = loss(models[0], *data(6, 3, seed=0))
    train(models[0], optimizers[0], 1)
    assert torch.equal(optimizers[1].step(closure), expected)
    assert len(calls) == 1
    assert_equal(*models)


# Groups ----------------------------------------------------------------------------------------------------


def test_the_first_group_and_the_defaults_are_what_schedulers_read() -> None:
    optimizer = FNGD(net(), lr=0.3, momentum=0.8, fallback_lr=0.1, weight_decay=0.01)
    groups = optimizer.param_groups
    assert [group["name"] for group in groups] == ["preconditioned", "preconditioned_no_decay", "plain_no_decay"]
    assert optimizer.defaults["lr"] == 0.3
    assert optimizer.defaults["momentum"] == 0.8
    assert [group["lr"] for group in groups] == [0.3, 0.3, 0.1]
    assert all(group["momentum"] == 0.8 for group in groups)


def test_schedulers_drive_every_group() -> None:
    model, optimizer = with_fngd(lr=0.1, fallback_lr=0.2)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 2)
    before = parameters(model)
    train(model, optimizer, 1)
    assert all(map(torch.equal, model.parameters(), before))  # a warm-up starts at zero
    warm_up.step()
    train(model, optimizer, 1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05, 0.1]
    assert not torch.equal(model.fc1.weight, before[0])


def test_one_cycle_may_cycle_the_momentum() -> None:
    model, optimizer = with_fngd(lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=4)
    for step in range(4):
        train(model, optimizer, 1, step)
        if step < 3:
            scheduler.step()
    assert all(group["momentum"] == pytest.approx(0.95) for group in optimizer.param_groups)


@pytest.mark.parametrize("fallback", ["adamw", "sgd"])
def test_the_other_parameters_follow_their_own_rule(fallback: str) -> None:
    model, plain = net(), net()
    settings = {"fallback_lr": 0.1, "momentum": 0.8, "beta2": 0.95, "eps": 1e-6, "layer_types": ["linear"]}
    optimizer = FNGD(model, lr=0.0, fallback=fallback, **settings)
    norm = list(plain.norm.parameters())
    reference = (
        torch.optim.AdamW(norm, lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.0)
        if fallback == "adamw"
        else torch.optim.SGD(norm, lr=0.1, momentum=0.8)
    )
    train(model, optimizer, 5)
    for step in range(5):
        one_step(plain, reference, *data(6, 3, seed=step))
    torch.testing.assert_close(parameters(model), parameters(plain), rtol=1e-10, atol=1e-12)


def test_configs_and_training_arguments_are_settings_of_their_attributes() -> None:
    config = FNGDConfig(lr=0.5, damping=0.1, update="momentum", sharing="replay")
    args = SimpleNamespace(learning_rate=0.25, weight_decay=0.125, max_grad_norm=0.0)
    optimizer = FNGD.from_config(net(), config, damping=0.2)
    assert optimizer.config == dataclasses.replace(config, damping=0.2)
    assert FNGD.from_config(net(), "paper").config == FNGDConfig.preset("paper", lr=1e-3)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["rule"] == "momentum"
    assert optimizer.settings.damping == 0.2
    for given, rule in ((None, "block_muon"), (dataclasses.replace(config, lr=None), "momentum")):
        optimizer = FNGD.from_training_args(net(), args, given)
        group = optimizer.param_groups[0]
        assert (group["lr"], group["weight_decay"], group["rule"]) == (0.25, 0.125, rule)


# Safety ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("update", "sharing"), RULES)
def test_zero_gradients_change_nothing(update: str, sharing: str) -> None:
    model, optimizer = with_fngd(update=update, sharing=sharing)
    before = parameters(model)
    (0 * loss(model, *data(6))).backward()
    optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))


def test_factors_that_half_precision_does_not_hold_scale_small_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 64)).half()
    optimizer = FNGD(model, update="momentum", sharing="never", lr=1e-3)
    before = [p.clone() for p in model.parameters()]
    for _ in range(2):
        (model(torch.randn(8, 256, dtype=torch.float16)).float().square().mean() * 1e-2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for p, q in zip(model.parameters(), before, strict=True):
        assert p.isfinite().all()
        assert (p != q).any()


def test_a_step_that_no_backward_went_before_does_not_count() -> None:
    """As torch.distributed.checkpoint takes one, with zero gradients, to make the state exist."""
    models = [net(), net()]
    settings = {"sharing": "replay", "update": "momentum", "fallback": "sgd", "weight_decay": 0.1}
    optimizers = [FNGD(model, **settings) for model in models]
    for p in models[0].parameters():
        p.grad = torch.zeros_like(p)
    rates = [group["lr"] for group in optimizers[0].param_groups]
    for group in optimizers[0].param_groups:
        group["lr"] = 0.0
    optimizers[0].step()
    for group, rate in zip(optimizers[0].param_groups, rates, strict=True):
        group["lr"] = rate
    assert optimizers[0].preconditioner.policy.steps == 0
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 3)
    assert_equal(*models)


def test_parameters_without_a_gradient_are_left_alone() -> None:
    model, optimizer = with_fngd(weight_decay=0.1)
    before = parameters(model)
    model.fc1(data(4)[0]).sum().backward()
    optimizer.step()
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q) == (p.grad is None)


def extended(model: nn.Module) -> nn.Module:
    model.extra = nn.Parameter(torch.ones(1))
    return model


def replaced(model: nn.Module) -> nn.Module:
    model.norm = nn.LayerNorm(7).double()
    return model


WRONG: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "another instance": (copy.deepcopy, "no gradient reached any parameter .* another instance"),
    "a parameter added": (extended, r"1 trainable parameters .* in no group .*\(extra"),
    "a module replaced": (replaced, r"2 trainable parameters .* in no group"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("steps", [0, 2])
def test_another_model_than_the_optimizers_is_seen_in_any_step(
    change: Callable[[nn.Module], nn.Module], message: str, steps: int
) -> None:
    model, optimizer = with_fngd()
    for _ in range(steps):
        one_step(model, optimizer, *data(6))
        optimizer.zero_grad()
    if steps and change is copy.deepcopy:
        return  # its gradients are nowhere to be seen, as those of a step without a backward pass
    trained_instead = change(model)
    loss(trained_instead, *data(6)).backward()
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()


@pytest.mark.parametrize("loaded", [False, True])
def test_a_first_step_whose_gradients_were_dropped_changes_nothing(loaded: bool) -> None:
    """As a loop does that leaves out a step after seeing its gradient, in the first step of a resumed run as well."""
    model, optimizer = with_fngd()
    if loaded:
        one_step(model, optimizer, *data(6))
        state = copy.deepcopy(optimizer.state_dict())
        model, optimizer = with_fngd()
        optimizer.load_state_dict(state)
    before = [p.clone() for p in model.parameters()]
    loss(model, *data(6)).backward()
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    one_step(model, optimizer, *data(6))
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("sharing", policy_names())
def test_layers_may_be_frozen_and_unfrozen(sharing: str) -> None:
    """Gradual unfreezing: FNGD is built while everything is trainable."""
    model, whole = net(), net()
    optimizer, other = FNGD(model, sharing=sharing), FNGD(whole, sharing=sharing)
    model.fc1.requires_grad_(False)
    model.norm.requires_grad_(False)
    before = [p.detach().clone() for p in (model.fc1.weight, model.norm.weight, model.fc2.weight)]
    for seed in range(3):
        one_step(model, optimizer, *data(6, seed=seed))
    now = [model.fc1.weight, model.norm.weight, model.fc2.weight]
    assert [torch.equal(a, b) for a, b in zip(before, now, strict=True)] == [True, True, False]
    report = optimizer.coverage()
    assert "fc1.weight" not in [*report.preconditioned, *report.missed]
    assert "fc2.weight" in report.preconditioned
    model.requires_grad_(True)
    whole.load_state_dict(model.state_dict())
    for of, by in ((model, optimizer), (whole, other)):
        by.zero_grad()
        loss(of, *data(6, seed=9)).backward()
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        if sharing != "replay":  # whose first epoch had no sample weights of the frozen layer
            torch.testing.assert_close(p.grad, q.grad)
    optimizer.step()
    assert not torch.equal(model.fc1.weight, before[0])
    assert "fc1.weight" in optimizer.coverage().preconditioned


def test_a_compiled_model_is_attached_to_what_it_runs() -> None:
    model = net()
    optimizer = FNGD(torch.compile(model, backend="eager"))
    assert optimizer.preconditioner.model is model
    one_step(model, optimizer, *data(6))


def test_a_step_before_any_backward_is_an_error() -> None:
    _model, optimizer = with_fngd()
    with pytest.raises(RuntimeError, match=r"or step\(\) came before backward\(\)"):
        optimizer.step()


def test_parameters_in_place_of_a_model_are_refused_by_naming_the_factory() -> None:
    model = net()
    for given in (model.parameters(), list(model.parameters()), [{"params": list(model.parameters())}]):
        with pytest.raises(TypeError, match=r"optimizer_cls_and_kwargs use \(FNGDFactory"):
            FNGD(given)


def test_the_factory_takes_the_name_of_a_config() -> None:
    assert FNGDFactory()(net(), config="paper").preconditioner.policy.name == "replay"


def test_a_group_of_a_users_own_is_refused() -> None:
    optimizer = FNGD(net())
    with pytest.raises(ValueError, match="FNGD makes its parameter groups from the model"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


@pytest.mark.parametrize("update", ["muon", "adam"])
@pytest.mark.parametrize("rows", [5, 9])
def test_moments_of_the_rows_that_stay_are_kept(update: str, rows: int, caplog: pytest.LogCaptureFixture) -> None:
    """As ``resize_token_embeddings``: the same Parameter, other data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Flatten(), nn.Linear(8, 2)).double()
    optimizer = FNGD(model, update=update, fallback="adamw")

    def step() -> None:
        optimizer.zero_grad()
        model(torch.tensor([[0, 1], [2, 3], [4, 1]])).square().sum().backward()
        optimizer.step()

    step()
    table = model[0].weight
    before = optimizer.state[table]["exp_avg"].clone()
    assert not caplog.records
    table.data = torch.cat([table.data, table.new_ones(2, 4)])[:rows]
    step()
    after = optimizer.state[table]["exp_avg"]
    kept = min(rows, 7)
    torch.testing.assert_close(after[:kept], 0.9 * before[:kept] + 0.1 * table.grad[:kept])
    assert (after[kept:] == 0).all()
    assert f"0.weight had 7 rows in an earlier step and has {rows}" in caplog.text
    weight = model[3].weight
    weight.data, weight.grad = weight.new_ones(2, 7), None
    weight.grad = torch.ones_like(weight)
    group = {"params": [weight], "param_names": ["3.weight"]}
    with pytest.raises(RuntimeError, match=r"3.weight has the shape \(2, 7\) and had \(2, 8\) in an earlier step"):
        optimizer._update_group(optimizer.param_groups[0] | group, None, None)
