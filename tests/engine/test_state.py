"""States: a run goes on from its own as it would have; those of another dtype, another model, another optimizer."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_fngd import FNGD, FNGDPreconditioner
from hf_fngd.arguments import UPDATES
from hf_fngd.sharing import INDEX_COLUMN, policy_names
from tests.nets import Net, assert_equal, data, loss, net, train, trained

SCHEDULE: dict[str, Any] = {"refresh": 3, "coefficient_steps": 2}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def tensors(value: Any, where: str = "") -> dict[str, Tensor]:
    """All tensors in nested dictionaries and lists, by their place."""
    if isinstance(value, Tensor):
        return {where: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {key: tensor for name, item in items for key, tensor in tensors(item, f"{where}.{name}").items()}


def own_state(optimizer: FNGD) -> dict[str, Tensor]:
    return tensors(optimizer.state_dict()["param_groups"][0]["fngd"])


# Resuming --------------------------------------------------------------------------------------------------


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


def of_the_engine(model: nn.Module, preconditioner: FNGDPreconditioner, seeds: range) -> list[Tensor]:
    """A few steps at fixed parameters; the gradients of the last one."""
    for seed in seeds:
        model.zero_grad()
        x, y = data(6, 3, seed=seed)
        F.cross_entropy(model(x, **{INDEX_COLUMN: torch.arange(6) + seed}), y).backward()
        preconditioner.step()
    return [p.grad.clone() for p in trained(model)]


@pytest.mark.parametrize("steps", [0, 2, 5])
@pytest.mark.parametrize("sharing", policy_names())
def test_a_resumed_preconditioner_goes_on_as_it_would_have(sharing: str, steps: int) -> None:
    made = [
        (model, FNGDPreconditioner(model, sharing=sharing, refresh=4, coefficient_steps=3)) for model in (net(), net())
    ]
    (model, preconditioner), (other, resumed) = made
    if steps:
        of_the_engine(model, preconditioner, range(steps))
    resumed.load_state_dict(saved(preconditioner.state_dict()))
    for more in range(steps, steps + 5):
        expected = of_the_engine(model, preconditioner, range(more, more + 1))
        found = of_the_engine(other, resumed, range(more, more + 1))
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


# Another dtype -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", policy_names())
@pytest.mark.parametrize("saved", DTYPES)
@pytest.mark.parametrize("loaded", DTYPES)
def test_a_state_goes_on_in_another_dtype(sharing: str, saved: str, loaded: str) -> None:
    """Through shared and coefficient steps; coefficients and rho stay in float32 or better."""
    arguments = {"lr": 0.03, "update": "momentum", "sharing": sharing, **SCHEDULE}
    model = net(dtype=DTYPES[saved])
    optimizer = FNGD(model, **arguments)
    train(model, optimizer, 3)
    other = net(seed=1, dtype=DTYPES[loaded])
    resumed = FNGD(other, **arguments)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for name, value in own_state(resumed).items():
        assert torch.equal(value, own_state(optimizer)[name].to(value.dtype)), name
    before = [p.detach().clone() for p in trained(other)]
    train(other, resumed, 4, first=3)
    assert resumed.preconditioner.phase.steps == 7
    kept = {value.dtype for value in own_state(resumed).values()}
    assert kept <= {torch.float32, torch.float64, torch.int32}  # int32: how often index sharing weighted each sample
    assert {value.dtype for value in tensors(resumed.state_dict()["state"]).values()} == {DTYPES[loaded]}
    for p, q in zip(trained(other), before, strict=True):
        assert torch.isfinite(p).all()
        assert not torch.equal(p, q)


def test_a_state_in_float64_equals_one_in_float32_up_to_rounding() -> None:
    """A float32 state in a float64 model: the same training as before, in better arithmetic."""
    arguments = {"lr": 1e-3, "update": "momentum", "sharing": "last", **SCHEDULE}
    model = net(dtype=torch.float32)
    optimizer = FNGD(model, **arguments)
    train(model, optimizer, 3)
    other = net(dtype=torch.float64)
    resumed = FNGD(other, **arguments)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 4, first=3)
    train(other, resumed, 4, first=3)
    for p, q in zip(trained(other), trained(model), strict=True):
        torch.testing.assert_close(p.float(), q, rtol=1e-4, atol=1e-5)


# Another model or optimizer ------------------------------------------------------------------------------


class Deep(Net):
    """A third layer."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.norm(self.middle(self.fc1(x))))).flatten(1, -2).mean(1)


class Turned(Net):
    """The same layers, constructed in another order."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("norm", "fc1"):
            self.add_module(name, self._modules.pop(name))


class Longer(Net):
    """The same layers, and one more norm."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.LayerNorm(7)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.extra(self.norm(self.fc1(x))))).flatten(1, -2).mean(1)


def deep() -> nn.Module:
    torch.manual_seed(0)
    return Deep().double()


def turned() -> nn.Module:
    torch.manual_seed(0)
    return Turned().double()


def longer() -> nn.Module:
    torch.manual_seed(0)
    return Longer().double()


def wide() -> nn.Module:
    return net(width=9)


OTHERS = [
    pytest.param(deep, {}, {}, "layers|parameter", id="layers"),
    pytest.param(deep, {"sharing": "never"}, {"sharing": "never"}, "layers|parameter", id="layers-never"),
    pytest.param(deep, {"sharing": "uniform"}, {"sharing": "uniform"}, "layers|parameter", id="layers-uniform"),
    pytest.param(longer, {}, {}, "parameter", id="plain-parameters"),
    pytest.param(
        net,
        {"sharing": "last"},
        {"sharing": "ranked"},
        "made with sharing='last', this optimizer has sharing='ranked'",
        id="policy",
    ),
    pytest.param(
        net, {"update": "adam"}, {}, r"\['adam', 'adam', 'adam'\], this optimizer's are \['muon'", id="update"
    ),
    pytest.param(net, {"fallback": "sgd"}, {}, "update rules are", id="fallback"),
    pytest.param(wide, {}, {}, "shape", id="shapes"),
    pytest.param(turned, {}, {}, "shape|order", id="order"),
]


@pytest.mark.parametrize(("build", "saved", "own", "message"), OTHERS)
def test_a_state_of_another_kind_is_refused_and_changes_nothing(
    build: Callable[[], nn.Module], saved: dict[str, Any], own: dict[str, Any], message: str
) -> None:
    foreign_model = build()
    foreign = FNGD(foreign_model, lr=0.7, **{**SCHEDULE, **saved})
    train(foreign_model, foreign, 3)
    models = [net(seed=1), net(seed=1)]
    optimizers = [FNGD(model, **{**SCHEDULE, **own}) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 3)
    given = foreign.state_dict()
    kept = tensors(copy.deepcopy(given))
    with pytest.raises(ValueError, match=message):
        optimizers[0].load_state_dict(given)
    assert all(torch.equal(value, kept[name]) for name, value in tensors(given).items())
    found, expected = (tensors(optimizer.state_dict()) for optimizer in optimizers)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 4, first=3)  # shared and coefficient steps
    for p, q in zip(trained(models[0]), trained(models[1]), strict=True):
        assert torch.equal(p, q)


def test_the_state_of_another_policy_is_refused() -> None:
    state = FNGDPreconditioner(net(), sharing="last").state_dict()
    with pytest.raises(ValueError, match="made with sharing='last', this optimizer has sharing='ranked'"):
        FNGDPreconditioner(net(), sharing="ranked").load_state_dict(state)


def test_the_state_of_another_optimizer_is_refused() -> None:
    sgd = torch.optim.SGD(net().parameters())
    with pytest.raises(ValueError, match="not written by FNGD"):
        FNGD(net()).load_state_dict(state_dict=sgd.state_dict())


CUT = [
    "engine",
    "norms",
    "engine.phase",
    "engine.place",
    "engine.averages",
    "engine.layers",
    "engine.sharing",
    "engine.policy",
]


@pytest.mark.parametrize("key", CUT)
def test_a_state_that_lacks_a_part_is_refused_and_changes_nothing(key: str) -> None:
    models = [net(), net()]
    optimizers = [FNGD(model, update="momentum", sharing="last", **SCHEDULE) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 3)
    state = copy.deepcopy(optimizers[0].state_dict())
    train(models[0], optimizers[0], 1, first=3)
    train(models[1], optimizers[1], 1, first=3)
    place = state["param_groups"][0]["fngd"]
    *path, last = key.split(".")
    for name in path:
        place = place[name]
    del place[last]
    with pytest.raises(ValueError, match=last):
        optimizers[0].load_state_dict(state)
    found, expected = (tensors(optimizer.state_dict()) for optimizer in optimizers)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
