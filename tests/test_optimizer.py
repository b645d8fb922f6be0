"""FNGD as a whole: trajectories against the slow reference, scales, groups, safety, state."""

import copy
import io
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hf_fngd import FNGD
from hf_fngd.arguments import UPDATES
from hf_fngd.sharing import INDEX_COLUMN, policy_names
from tests.nets import data, loss, net, trained
from tests.reference import Dense, per_sample_gradients, run

LAYER_NAMES = ("fc1", "fc2")


def parameters(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def train(model: nn.Module, optimizer: FNGD, steps: int, first: int = 0, scale: float = 1.0) -> None:
    for step in range(first, first + steps):
        x, y = data(6, 3, seed=step)
        x = x.to(model.fc1.weight.dtype)
        optimizer.zero_grad()
        (scale * F.cross_entropy(model(x, **{INDEX_COLUMN: torch.arange(6) + step}), y)).backward()
        optimizer.step()


def assert_equal(model: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


# The trajectory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step_scale", ["ngd", "rms"])
@pytest.mark.parametrize("last", [4, 2])
@pytest.mark.parametrize(
    ("sharing", "refresh"), [("replay", 0), ("replay", 3), ("ranked", 0), ("ranked", 3), ("ranked", 1)]
)
def test_seventeen_steps_are_those_of_the_slow_reference(
    sharing: str, refresh: int, last: int, step_scale: str
) -> None:
    sizes = [6, 6, 6, 6, 6, 6, 6, last]  # an epoch, whose last batch is short
    batches = [data(sizes[step % 8], 2, seed=step) for step in range(17)]
    settings = {
        "lr": {"ngd": 0.05, "rms": 0.01}[step_scale],
        "momentum": 0.9,
        "damping": 0.01,
        "weight_decay": 0.1,
        "sharing": sharing,
        "refresh": refresh,
        "step_scale": step_scale,
        "fallback_lr": 0.02,
    }
    model = net(width=5)
    expected = run(model, LAYER_NAMES, batches, loss, epoch=8, **settings)
    optimizer = FNGD(model, update="momentum", fallback="sgd", **settings)
    for step, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        loss(model, x, y).backward()
        optimizer.step()
        if step in (7, 15):
            optimizer.end_epoch()
        for p, q in zip(model.parameters(), expected[step], strict=True):
            torch.testing.assert_close(p.detach(), q, rtol=1e-9, atol=1e-9)
    moved = [(p - q).norm() for p, q in zip(model.parameters(), expected[0], strict=True)]
    assert min(moved) > 1e-3


# Step scale ----------------------------------------------------------------------------------------------


def square(width: int, dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, width, dtype=dtype)


def uncorrelated(samples: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(samples, width, generator=generator, dtype=torch.float64)
    return x, torch.randint(width, (samples,), generator=generator)


def first_update(model: nn.Linear, x: Tensor, y: Tensor, scale: float = 1.0, **arguments: Any) -> Tensor:
    """What the first step adds to the layer's parameters, flat."""
    optimizer = FNGD(model, momentum=0.0, update="momentum", fallback="sgd", **arguments)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    (scale * F.cross_entropy(model(x), y)).backward()
    optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]) - before


def root_mean_square(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def dense(model: nn.Linear, x: Tensor, y: Tensor, damping: float) -> Dense:
    def alone(model: nn.Module, n: int) -> Tensor:
        return F.cross_entropy(model(x[n : n + 1]), y[n : n + 1])

    return Dense(per_sample_gradients(model, trained(model), alone, len(x)), damping)


@pytest.mark.parametrize("damping", [1e-3, 0.1, 30.0])
@pytest.mark.parametrize("width", [32, 128, 512])
def test_rms_updates_have_the_size_of_lr_at_any_width_and_damping(width: int, damping: float) -> None:
    """RMS = lr / sqrt(rho), exactly; lr at rho = 1.

    Width and damping enter through rho alone. For uncorrelated samples K is nearly a multiple of the identity
    and rho nearly sqrt(N), whatever the two are.
    """
    model, (x, y) = square(width), uncorrelated(8, width)
    rho = dense(model, x, y, damping).rho
    update = first_update(model, x, y, lr=0.01, damping=damping, step_scale="rms")
    assert root_mean_square(update) * float(rho.sqrt()) == pytest.approx(0.01, rel=1e-9)
    assert root_mean_square(update) == pytest.approx(0.01 / 8**0.25, rel=0.05)


@pytest.mark.parametrize("damping", [1e-3, 0.1, 30.0])
def test_rms_updates_have_the_size_of_lr_where_all_samples_agree(damping: float) -> None:
    model, (x, y) = square(32), uncorrelated(1, 32)
    update = first_update(model, x.repeat(8, 1), y.repeat(8), lr=0.01, damping=damping, step_scale="rms")
    assert root_mean_square(update) == pytest.approx(0.01, rel=1e-6)


@pytest.mark.parametrize("damping", [1e-3, 0.1, 30.0])
def test_ngd_updates_are_the_papers_within_the_trust_region(damping: float) -> None:
    """The paper's update shrinks as the loss is scaled up, and has no bound as it is scaled down."""
    model, (x, y) = square(32), uncorrelated(8, 32)
    exact = dense(model, x, y, damping)
    natural = -0.01 * exact.p / exact.lam_prime
    assert root_mean_square(natural) / 1e4 < 0.01 < root_mean_square(natural) * 1e4
    arguments = {"lr": 0.01, "damping": damping, "step_scale": "ngd"}
    within = first_update(square(32), x, y, scale=1e4, **arguments)
    torch.testing.assert_close(within, natural / 1e4, rtol=1e-8, atol=1e-14)
    bounded = first_update(square(32), x, y, scale=1e-4, **arguments)
    torch.testing.assert_close(bounded, natural * 0.01 / root_mean_square(natural), rtol=1e-8, atol=1e-14)


def test_a_later_rms_update_is_measured_by_a_running_mean() -> None:
    model, (x, y) = square(16), uncorrelated(8, 16)
    optimizer = FNGD(model, lr=0.0, update="momentum", fallback="sgd", step_scale="rms", sharing="never")
    for factor in (1.0, 10.0):
        optimizer.zero_grad()
        (factor * F.cross_entropy(model(x), y)).backward()
        optimizer.step()
    squared = sum(float(p.grad.square().sum()) for p in model.parameters())
    assert float(optimizer._norms) == pytest.approx(squared * (0.95 / 100 + 0.05))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("power", [-16, 16])
def test_a_trajectory_does_not_see_the_loss_scale(power: int, update: str) -> None:
    models = [net(bias="none"), net(bias="none")]
    for model, scale in zip(models, (1.0, 2.0**power), strict=True):
        optimizer = FNGD(
            model, 0.01, update=update, step_scale="rms", fallback_lr=0.0, refresh=2, coefficient_steps=3, eps=1e-300
        )
        train(model, optimizer, 8, scale=scale)
    assert_equal(*models)
    assert not torch.equal(models[0].fc1.weight, net(bias="none").fc1.weight)


@pytest.mark.parametrize("update", ["adam", "muon"])
def test_scale_free_updates_do_not_ask_for_a_step_scale(update: str) -> None:
    models = [net(), net()]
    for model, step_scale in zip(models, ("rms", "ngd"), strict=True):
        train(model, FNGD(model, update=update, step_scale=step_scale), 4)
    assert_equal(*models)


# Groups --------------------------------------------------------------------------------------------------


def test_the_first_group_and_the_defaults_are_what_schedulers_read() -> None:
    optimizer = FNGD(net(), lr=0.3, momentum=0.8, fallback_lr=0.1, weight_decay=0.01)
    assert [group["name"] for group in optimizer.param_groups] == [
        "preconditioned",
        "preconditioned_no_decay",
        "plain_no_decay",
    ]
    assert optimizer.defaults["lr"] == 0.3
    assert optimizer.defaults["momentum"] == 0.8
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.3, 0.1]
    assert all(group["momentum"] == 0.8 for group in optimizer.param_groups)


def test_schedulers_drive_every_group() -> None:
    model = net()
    optimizer = FNGD(model, lr=0.1, fallback_lr=0.2)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 2)
    before = parameters(model)
    train(model, optimizer, 1)
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)  # a warm-up starts at zero
    warm_up.step()
    train(model, optimizer, 1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05, 0.1]
    assert not torch.equal(model.fc1.weight, before[0])


def test_one_cycle_may_cycle_the_momentum() -> None:
    model = net()
    optimizer = FNGD(model, lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=4)
    for step in range(4):
        train(model, optimizer, 1, step)
        if step < 3:
            scheduler.step()
    assert all(group["momentum"] == pytest.approx(0.95) for group in optimizer.param_groups)


@pytest.mark.parametrize("fallback", ["adamw", "sgd"])
def test_the_other_parameters_follow_their_own_rule(fallback: str) -> None:
    model, plain = net(), net()
    optimizer = FNGD(model, lr=0.0, fallback=fallback, fallback_lr=0.1, momentum=0.8, beta2=0.95, eps=1e-6)
    norm = list(plain.norm.parameters())
    reference = (
        torch.optim.AdamW(norm, lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.0)
        if fallback == "adamw"
        else torch.optim.SGD(norm, lr=0.1, momentum=0.8)
    )
    train(model, optimizer, 5)
    for step in range(5):
        plain.zero_grad()
        loss(plain, *data(6, 3, seed=step)).backward()
        reference.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sharing", policy_names())
@pytest.mark.parametrize("update", UPDATES)
def test_every_update_and_policy_trains(update: str, sharing: str) -> None:
    model, (x, _) = net(width=16), data(24, 2)
    y = x.mean(dim=1)[:, :4].argmax(dim=1)
    optimizer = FNGD(model, lr=0.03, damping=0.1, update=update, sharing=sharing, refresh=3, coefficient_steps=4)
    losses = []
    for step in range(60):
        picked = torch.arange(8) + 8 * (step % 3)
        optimizer.zero_grad()
        value = F.cross_entropy(model(x[picked], **{INDEX_COLUMN: picked}), y[picked])
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


# Safety --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", UPDATES)
def test_zero_gradients_change_nothing(update: str) -> None:
    model = net()
    optimizer = FNGD(model, update=update)
    before = parameters(model)
    (0 * loss(model, *data(6))).backward()
    optimizer.step()
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)
    train(model, optimizer, 2)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_step_that_no_backward_went_before_does_not_count() -> None:
    """As torch.distributed.checkpoint takes one, with zero gradients, to make the state exist."""
    models = [net(), net()]
    optimizers = [FNGD(model, update="momentum", fallback="sgd", weight_decay=0.1) for model in models]
    for p in models[0].parameters():
        p.grad = torch.zeros_like(p)
    rates = [group["lr"] for group in optimizers[0].param_groups]
    for group in optimizers[0].param_groups:
        group["lr"] = 0.0
    optimizers[0].step()
    for group, rate in zip(optimizers[0].param_groups, rates, strict=True):
        group["lr"] = rate
    assert optimizers[0].preconditioner.phase.steps == 0
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 3)
    assert_equal(*models)


def test_a_skipped_step_leaves_the_phase_alone() -> None:
    """A loss scaler does not step after an overflow; what the batch measured must not be used either."""
    model = net()
    optimizer = FNGD(model, sharing="last", coefficient_steps=2)
    train(model, optimizer, 1)
    rho, row = optimizer.preconditioner.rho.clone(), optimizer.preconditioner.policy.row.clone()
    (torch.inf * loss(model, *data(6, 3))).backward()
    optimizer.zero_grad()
    assert optimizer.preconditioner.phase.steps == 1
    assert torch.equal(optimizer.preconditioner.rho, rho)
    assert torch.equal(optimizer.preconditioner.policy.row, row)
    train(model, optimizer, 1, first=1)
    assert optimizer.preconditioner.phase.steps == 2
    assert torch.isfinite(optimizer.preconditioner.rho).all()
    assert torch.isfinite(optimizer.preconditioner.policy.row).all()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_parameters_without_a_gradient_are_left_alone() -> None:
    model = net()
    optimizer = FNGD(model, weight_decay=0.1)
    before = parameters(model)
    model.fc1(data(4)[0]).sum().backward()
    optimizer.step()
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q) == (p.grad is None)


def unfrozen(model: nn.Module) -> nn.Module:
    model.fc1.requires_grad_(True)
    return model


def frozen(model: nn.Module) -> nn.Module:
    model.norm.requires_grad_(False)
    return model


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
    "frozen later": (frozen, "2 parameters of this optimizer are not trainable parameters"),
    "unfrozen later": (unfrozen, r"2 trainable parameters .* in no group .*fc1.weight"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_another_model_than_the_optimizers_is_seen_in_the_first_step(
    change: Callable[[nn.Module], nn.Module], message: str
) -> None:
    model = net()
    if change is unfrozen:
        model.fc1.requires_grad_(False)
    optimizer = FNGD(model)
    trained_instead = change(model)
    loss(trained_instead, *data(6)).backward()
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()


def test_a_step_before_any_backward_is_an_error() -> None:
    model = net()
    optimizer = FNGD(model)
    with pytest.raises(RuntimeError, match=r"or step\(\) came before backward\(\)"):
        optimizer.step()


def test_a_second_optimizer_on_the_model_is_refused() -> None:
    model = net()
    first = FNGD(model)
    with pytest.raises(RuntimeError, match=r"attached to another FNGD already; call hf_fngd.detach\(model\) first"):
        FNGD(model)
    train(model, first, 1)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"lr": -1}, ValueError),
        ({"momentum": 1.0}, ValueError),
        ({"damping": 0}, ValueError),
        ({"weight_decay": -1e-3}, ValueError),
        ({"step_scale": "nsd"}, ValueError),
        ({"update": "sgd"}, ValueError),
        ({"fallback": "adam"}, ValueError),
        ({"fallback_lr": "0.1"}, TypeError),
        ({"beta2": 1}, ValueError),
        ({"eps": 0}, ValueError),
        ({"sharing": "lasting"}, ValueError),
        ({"refresh": 1.5}, TypeError),
    ],
)
def test_bad_arguments_name_themselves_and_leave_the_model_alone(
    arguments: dict[str, Any], error: type[Exception]
) -> None:
    model = net()
    (name,) = arguments
    with pytest.raises(error, match=f"{name} must be"):
        FNGD(model, **arguments)
    assert type(model.fc1) is nn.Linear


def test_parameters_in_place_of_a_model_are_refused_by_naming_the_factory() -> None:
    model = net()
    for given in (model.parameters(), list(model.parameters()), [{"params": list(model.parameters())}]):
        with pytest.raises(TypeError, match=r"optimizer_cls_and_kwargs use \(FNGDFactory"):
            FNGD(given)


# End of an epoch under Accelerate ------------------------------------------------------------------------


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield Accelerator()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize(
    ("samples", "accumulation", "epochs", "expected"),
    [(12, 1, 2, 4), (10, 1, 2, 4), (12, 2, 2, 2), (15, 2, 2, 3), (12, 1, 1, 4), (3, 1, 2, 1)],
)
def test_the_phase_ends_with_the_first_epoch_without_being_told(
    accelerator: Accelerator, samples: int, accumulation: int, epochs: int, expected: int
) -> None:
    model = net()
    batches = DataLoader(TensorDataset(*data(samples)), batch_size=3)
    accelerator.gradient_accumulation_steps = accumulation
    prepared, optimizer, batches = accelerator.prepare(model, FNGD(model), batches)
    phase = optimizer.optimizer.preconditioner.phase
    for _ in range(epochs):
        for x, y in batches:
            with accelerator.accumulate(prepared):
                optimizer.zero_grad()
                accelerator.backward(loss(prepared, x, y))
                optimizer.step()
    assert phase.shared_since == expected
    assert phase.steps == expected * epochs


# State ---------------------------------------------------------------------------------------------------


def saved(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


STATES = [
    *({"update": update} for update in UPDATES),
    *({"update": "momentum", "step_scale": "ngd", "fallback": "sgd", "sharing": name} for name in policy_names()),
    {"update": "momentum", "step_scale": "rms", "fallback": "adamw"},
]


@pytest.mark.parametrize("steps", [0, 2, 5])
@pytest.mark.parametrize("arguments", STATES, ids=lambda arguments: "-".join(arguments.values()))
def test_a_resumed_run_goes_on_as_it_would_have(arguments: dict[str, Any], steps: int) -> None:
    arguments = {"refresh": 3, "coefficient_steps": 3, "weight_decay": 0.1, **arguments}
    model, other = net(), net(seed=1)
    optimizer = FNGD(model, **arguments)
    train(model, optimizer, steps)
    checkpoint, weights = saved(optimizer.state_dict()), saved(model.state_dict())
    other.load_state_dict(weights)
    resumed = FNGD(other, **(arguments | {"lr": 0.5}))
    resumed.load_state_dict(checkpoint)
    assert resumed.preconditioner.phase == optimizer.preconditioner.phase
    for each, of in ((model, optimizer), (other, resumed)):
        train(each, of, 5, first=steps)
    assert_equal(model, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_its_own_state_changes_nothing(dtype: torch.dtype) -> None:
    """Accelerate does so when it prepares an optimizer; fp32 coefficients must not become bfloat16."""
    models = [net(dtype=dtype), net(dtype=dtype)]
    optimizers = [FNGD(model, update="momentum", sharing="last", coefficient_steps=2, refresh=3) for model in models]
    for step in range(7):
        for _ in range(2):
            optimizers[0].load_state_dict(optimizers[0].state_dict())
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, 1, step)
        assert_equal(*models)
    assert optimizers[0].preconditioner.policy.row.dtype == torch.float32


def test_a_state_dict_is_plain() -> None:
    model = net()
    optimizer = FNGD(model)
    train(model, optimizer, 3)

    def check(value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                assert isinstance(key, str | int)
                check(item)
        elif isinstance(value, list):
            for item in value:
                check(item)
        else:
            assert value is None or type(value) in (Tensor, str, int, float, bool)

    check(optimizer.state_dict())
    assert set(optimizer.state_dict()) == {"state", "param_groups"}


def test_foreign_states_are_refused_by_name() -> None:
    model = net()
    optimizer = FNGD(model)
    sgd = torch.optim.SGD(net().parameters())
    with pytest.raises(ValueError, match="not written by FNGD"):
        optimizer.load_state_dict(state_dict=sgd.state_dict())
    other = FNGD(net(), update="adam").state_dict()
    with pytest.raises(ValueError, match=r"\['adam', 'adam', 'adam'\], this optimizer's are \['muon'"):
        optimizer.load_state_dict(other)
    policy = FNGD(net(), sharing="last").state_dict()
    with pytest.raises(ValueError, match="sharing='last'"):
        optimizer.load_state_dict(policy)


def test_a_refused_state_changes_nothing() -> None:
    models = [net(), net()]
    optimizers = [FNGD(model) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 2)
    other_model = net(seed=3)
    other = FNGD(other_model, sharing="last", lr=0.7)
    train(other_model, other, 3)
    with pytest.raises(ValueError, match="sharing='last'"):
        optimizers[0].load_state_dict(other.state_dict())
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 2, first=2)
    assert_equal(*models)


# What it passes on ---------------------------------------------------------------------------------------


def test_detaching_leaves_a_plain_model_behind() -> None:
    model = net()
    optimizer = FNGD(model)
    optimizer.detach()
    assert type(model.fc1) is nn.Linear


def test_the_coverage_is_complete_after_a_step() -> None:
    model = net()
    optimizer = FNGD(model)
    train(model, optimizer, 1)
    assert set(optimizer.coverage().preconditioned) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    assert set(optimizer.coverage().plain) == {"norm.weight", "norm.bias"}


@pytest.mark.parametrize("update", UPDATES)
def test_diagnostics_know_lambda(update: str) -> None:
    model, (x, y) = square(6), uncorrelated(5, 6)
    exact = dense(model, x, y, 0.01)
    optimizer = FNGD(model, damping=0.01, update=update)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert optimizer.diagnostics() == pytest.approx(
        {
            "phase": 0.0,
            "rho": float(exact.rho),
            "weight_spread": float(exact.w.std(correction=0)),
            "lambda": float(exact.lam),
            "skipped": 0.0,
        }
    )


def test_end_epoch_ends_the_first_phase() -> None:
    model = net()
    optimizer = FNGD(model)
    train(model, optimizer, 2)
    assert optimizer.diagnostics()["phase"] == 0
    optimizer.end_epoch()
    assert optimizer.diagnostics()["phase"] == 1


def test_configs_and_training_arguments_are_read_by_their_attributes() -> None:
    arguments = {"lr": 0.5, "damping": 0.1, "update": "momentum", "sharing": "last"}
    config = SimpleNamespace(optimizer_arguments=lambda: dict(arguments))
    args = SimpleNamespace(learning_rate=0.25, weight_decay=0.125)
    optimizer = FNGD.from_config(net(), config, damping=0.2)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["rule"] == "momentum"
    assert optimizer.preconditioner.damping == 0.2
    for given, rule in ((None, "muon"), (config, "momentum")):
        optimizer = FNGD.from_training_args(net(), args, given)
        group = optimizer.param_groups[0]
        assert (group["lr"], group["weight_decay"], group["rule"]) == (0.25, 0.125, rule)
