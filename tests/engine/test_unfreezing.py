"""Gradual unfreezing: layers that are frozen when FNGD is built join when they are unfrozen."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from hf_fngd import FNGD, FNGDPreconditioner, policy_names
from hf_fngd.engine.reasons import USED_ELSEWHERE
from tests.nets import UPDATES_OF, Elsewhere, Net, data, loss, net, settings_of
from tests.reference import Clipping, Dense, per_sample_gradients, uses_of
from tests.steps import assert_equal, one_step, relative_error, through_file, train

FROZEN = ("fc1", "norm")
RUNS = [(sharing, update) for sharing in policy_names() for update in UPDATES_OF[sharing]]


def freeze(model: nn.Module, frozen: bool = True) -> nn.Module:
    for name in FROZEN:
        model.get_submodule(name).requires_grad_(not frozen)
    return model


def made(frozen: bool = True, seed: int = 0, **settings: Any) -> tuple[Net, FNGD]:
    """A net and FNGD on it; layers are frozen before that, or after it."""
    model = freeze(net(seed=seed), frozen)
    arguments = {"lr": 0.05, "weight_decay": 0.1} | settings
    optimizer = FNGD(model, **(settings_of(arguments["sharing"], damping=0.05) | arguments))
    return freeze(model), optimizer


# The numbers -----------------------------------------------------------------------------------------------


def weighed(model: nn.Module, x: Tensor, y: Tensor, sharing: str) -> dict[str, Tensor]:
    """The gradients of a plain model's layers, sample by sample."""

    def alone(model: nn.Module, n: int) -> Tensor:
        return F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]) / len(x) * (30.0 if n == 0 else 1.0)

    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    layers = [name for name in ("fc1", "norm", "fc2") if f"{name}.weight" in trained]
    if sharing == "clipped":
        samples = [uses_of(model, layers, alone, n, trained) for n in range(len(x))]
        return Clipping().gradients(samples)[0]
    found = {}
    for name in layers:
        own = dict(model.get_submodule(name).named_parameters(name))
        u = per_sample_gradients(model, list(own.values()), lambda model, n: len(x) * alone(model, n), len(x))
        w = torch.ones(len(x)) if name == "norm" or sharing == "uniform" else Dense(u, 0.05).w
        sizes = [p.numel() for p in own.values()]
        found |= dict(zip(own, (u @ w.double() / len(x)).split(sizes), strict=True))
    return found


@pytest.mark.parametrize("sharing", ["clipped", "uniform", "never"])
def test_a_run_that_unfreezes_layers_is_the_float64_run(sharing: str) -> None:
    """The engine alone before torch's SGD, with the first sample 30 times as loud."""
    model = freeze(net())
    slow = copy.deepcopy(model)
    preconditioner = FNGDPreconditioner(model, **settings_of(sharing, damping=0.05))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner.follow(optimizer)
    for step in range(6):
        if step == 3:
            for each in (model, slow):
                freeze(each, frozen=False)
        x, y = data(6, seed=step)
        optimizer.zero_grad()
        each = F.cross_entropy(model(x), y, reduction="none")
        (each * torch.tensor([30.0] + [1.0] * 5)).mean().backward()
        for name, g in weighed(slow, x, y, sharing).items():
            slow.get_parameter(name).data.sub_(0.1 * g.view_as(slow.get_parameter(name)))
        optimizer.step()
        for (name, p), q in zip(model.named_parameters(), slow.named_parameters(), strict=True):
            assert torch.equal(p, q[1]) or relative_error(p.detach(), q[1].detach()) < 1e-9, (step, name)
    assert not torch.equal(model.fc1.weight, net().fc1.weight)


@pytest.mark.parametrize(("sharing", "update"), RUNS)
def test_layers_that_are_frozen_before_fngd_join_as_those_that_are_frozen_after_it(sharing: str, update: str) -> None:
    runs = [made(frozen, sharing=sharing, update=update) for frozen in (True, False)]
    for model, optimizer in runs:
        train(model, optimizer, 3)
        assert_equal(model.fc1, net().fc1)
        train(freeze(model, frozen=False), optimizer, 3, first=3)
        assert not torch.equal(model.fc1.weight, net().fc1.weight)
    assert_equal(runs[0][0], runs[1][0])
    assert runs[0][1].coverage() == runs[1][1].coverage()
    assert "fc1.weight" in runs[0][1].coverage().preconditioned


# States ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("stop", [2, 4])
@pytest.mark.parametrize(("sharing", "update"), RUNS)
def test_a_resumed_run_goes_on_as_it_would_have(sharing: str, update: str, stop: int, frozen: bool) -> None:
    """Stopped before and after the third step, in which layers join; they may be trained when FNGD is built again."""

    def run(model: nn.Module, optimizer: FNGD, first: int, last: int) -> None:
        for step in range(first, last):
            freeze(model, frozen=step < 3)
            train(model, optimizer, 1, first=step)

    model, optimizer = made(sharing=sharing, update=update)
    run(model, optimizer, 0, stop)
    state, weights = through_file(optimizer.state_dict()), through_file(model.state_dict())
    other, resumed = made(frozen, seed=1, sharing=sharing, update=update)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for each, of in ((model, optimizer), (other, resumed)):
        run(each, of, stop, 6)
    assert_equal(model, other)
    assert resumed.diagnostics() == optimizer.diagnostics()


def test_a_resumed_run_keeps_its_blocks_where_layers_had_joined_before() -> None:
    """Texts are long when the positions are counted, and short later."""

    def run(model: nn.Module, optimizer: FNGD, first: int, last: int) -> None:
        for step in range(first, last):
            freeze(model, frozen=step < 1)
            model(data(4, 200 if step < 3 else 2, seed=step)[0]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = made(sharing="clipped")
    run(model, optimizer, 0, 3)
    other, resumed = made(seed=1, sharing="clipped")
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    for each, of in ((model, optimizer), (other, resumed)):
        run(each, of, 3, 5)
    assert resumed.preconditioner.positions.count == optimizer.preconditioner.positions.count == 800
    assert_equal(model, other)


def test_a_schedule_reaches_groups_that_are_frozen_at_first() -> None:
    model, optimizer = made(sharing="clipped")
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    train(model, optimizer, 1)
    scheduler.step()
    assert {group["lr"] for group in optimizer.param_groups} == {0.025}
    assert [group["name"] for group in optimizer.param_groups][-1] == "plain_no_decay"
    assert all(not p.requires_grad for p in optimizer.param_groups[-1]["params"])


def without_frozen(optimizer: FNGD) -> dict[str, Any]:
    """The state as it was written before frozen parameters were in the groups."""
    state = optimizer.state_dict()
    live = {name for name, p in optimizer.preconditioner.model.named_parameters() if p.requires_grad}
    numbers: dict[int, int] = {}
    for group in state["param_groups"]:
        kept = [place for place, name in enumerate(group["param_names"]) if name in live]
        for key in ("params", "param_names", "layers"):
            group[key] = [value for place, value in enumerate(group[key]) if place in kept]
        group["layers"] = [0] * len(group["layers"])
        numbers |= {key: len(numbers) + n for n, key in enumerate(group["params"])}
        group["params"] = [numbers[key] for key in group["params"]]
    state["param_groups"] = [group for group in state["param_groups"] if group["params"]]
    engine = state["param_groups"][0]["fngd"]["engine"]
    engine["layers"] = {"fc2": engine["layers"]["fc2"]}
    engine["policy"]["means"] = engine["policy"]["means"][1:2]
    return state | {"state": {numbers[key]: value for key, value in state["state"].items()}}


def test_a_state_without_the_frozen_layers_loads_and_those_of_its_groups_join() -> None:
    model, optimizer = made(sharing="clipped")
    for step in range(2):
        for x, y in (data(6, seed=step), data(4, seed=9 + step)):
            loss(model, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    other, resumed = made(seed=1, sharing="clipped")
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(through_file(without_frozen(optimizer)))
    # A scheduler's state has as many learning rates as groups were there.
    assert [group["name"] for group in resumed.param_groups] == ["preconditioned", "preconditioned_no_decay"]
    assert torch.equal(resumed.preconditioner.policy.means, optimizer.preconditioner.policy.means)
    for each, of in ((model, optimizer), (other, resumed)):
        each.fc1.requires_grad_(True)
        train(each, of, 2, first=2)
    assert_equal(model, other)
    other.norm.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"2 trainable parameters .* in no group .*norm.weight"):
        train(other, resumed, 1)


def test_a_state_without_a_layer_that_is_trained_is_refused() -> None:
    model, optimizer = made(sharing="clipped")
    train(model, optimizer, 1)
    state = without_frozen(optimizer)
    other, resumed = made(sharing="clipped")
    freeze(other, frozen=False)
    with pytest.raises(ValueError, match="construct FNGD with the model"):
        resumed.load_state_dict(state)


# What is known of a layer ----------------------------------------------------------------------------------


def test_layers_that_join_are_told_which_rows_are_whose_sample() -> None:
    """A batch of as many samples as positions, of which sizes tell nothing."""
    model = freeze(net())
    optimizer = FNGD(model)
    x, y = data(6, 6)
    for frozen in (True, False):
        loss(freeze(model, frozen), x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert set(optimizer.coverage().preconditioned) >= {"fc1.weight", "fc2.weight"}
    assert optimizer.coverage().missed == {}


def test_a_weight_that_is_used_elsewhere_is_found_out_when_it_is_unfrozen() -> None:
    model = net(cls=Elsewhere)
    model.fc2.weight.requires_grad_(False)
    optimizer = FNGD(model)
    train(model, optimizer, 1)
    assert optimizer.coverage().missed == {}
    model.fc2.weight.requires_grad_(True)
    train(model, optimizer, 1)
    assert optimizer.coverage().missed["fc2.weight"] == USED_ELSEWHERE


def test_frozen_layers_are_not_reported_before_they_are_trained() -> None:
    model, optimizer = made(sharing="clipped")
    train(model, optimizer, 2)
    report = optimizer.coverage()
    assert {*report.preconditioned, *report.weighed, *report.plain} == {"fc2.weight", "fc2.bias"}
    assert report.missed == {}
    freeze(model, frozen=False)
    report = optimizer.coverage()
    assert set(report.preconditioned) == {f"{name}.{leaf}" for name in ("fc1", "fc2") for leaf in ("weight", "bias")}
    assert set(report.weighed) == {"norm.weight", "norm.bias"}


def test_a_bias_of_a_frozen_layer_is_plain_until_its_weight_is_trained() -> None:
    model = net()
    model.fc1.weight.requires_grad_(False)
    optimizer = FNGD(model)
    train(model, optimizer, 1)
    assert optimizer.coverage().plain["fc1.bias"] == "the layer's weight is frozen"
    model.fc1.weight.requires_grad_(True)
    train(model, optimizer, 1)
    report = optimizer.coverage()
    assert "fc1.weight" in report.preconditioned
    assert "fc1.bias" in report.weighed  # the fallback rule steps it, as when it was plain


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own
def test_a_compiled_model_takes_layers_that_join() -> None:
    model, plain = freeze(net()), freeze(net())
    optimizer, eager = FNGD(model), FNGD(plain)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for frozen in (True, False):
        for each, called, of in ((model, compiled, optimizer), (plain, plain, eager)):
            freeze(each, frozen)
            loss(called, *data(6)).backward()
            of.step()
            of.zero_grad()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert optimizer.coverage().missed == {}


# What frozen layers cost -----------------------------------------------------------------------------------


def test_a_frozen_layer_costs_no_more_than_its_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[nn.Module] = []
    own = nn.Linear.forward
    monkeypatch.setattr(
        "hf_fngd.engine.forward.Forwards._layer_forward",
        lambda self, layer, module, forward, *args: called.append(module) or own(module, *args),
    )
    model, optimizer = made(sharing="clipped")
    loss(model, *data(6)).backward()
    assert set(map(id, called)) == {id(model.fc2)}
    assert optimizer.state == {}


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantized_weight_stays_out(dtype: torch.dtype) -> None:
    model = net()
    model.base = nn.Linear(2, 2)
    model.base.weight = nn.Parameter(torch.ones(2, 2).to(dtype), requires_grad=False)
    model.base.bias.requires_grad_(False)
    optimizer = FNGD(model)
    assert type(model.base) is nn.Linear
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(model.base.weight) not in held


# Two models ------------------------------------------------------------------------------------------------


def test_two_models_may_share_an_encoder_while_it_is_frozen() -> None:
    encoder = nn.Linear(5, 5).double().requires_grad_(False)
    models = [nn.Sequential(encoder, nn.Linear(5, 4).double()) for _ in range(2)]
    optimizers = [FNGD(model) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        one_step(model, optimizer, *data(6))
        assert optimizer.coverage().preconditioned == ("1.weight", "1.bias")
    encoder.requires_grad_(True)
    one_step(models[0], optimizers[0], *data(6))
    with pytest.raises(RuntimeError, match="unfrozen is attached to another FNGD already"):
        one_step(models[1], optimizers[1], *data(6))


def test_a_frozen_layer_whose_forward_was_replaced_is_an_error_only_once_it_is_trained() -> None:
    model = freeze(net())
    model.fc1.forward = lambda x: nn.Linear.forward(model.fc1, x)
    optimizer = FNGD(model)
    train(model, optimizer, 1)
    with pytest.raises(RuntimeError, match="build FNGD before the model is prepared"):
        train(freeze(model, frozen=False), optimizer, 1)
