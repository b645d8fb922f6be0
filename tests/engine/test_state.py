"""States: a run goes on from its own as it would have; those of another dtype, another model, another optimizer."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_fngd import FNGD, policy_names
from hf_fngd.updates import FALLBACK_RULES
from tests.nets import EVERY_TYPE, UPDATES_OF, Net, data, loss, net, settings_of, trained
from tests.steps import assert_equal, parameters, through_file, train, with_engine

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


STATES = [
    *((update, fallback, "clipped") for update in UPDATES_OF["clipped"] for fallback in FALLBACK_RULES),
    *((UPDATES_OF[sharing][-1], "sgd", sharing) for sharing in policy_names() if sharing != "clipped"),
]


def made(
    sharing: str = "clipped", seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any
) -> tuple[Net, FNGD]:
    """A net, and FNGD on it with two coefficient steps, where it has them."""
    model = net(seed=seed, dtype=dtype)
    return model, FNGD(model, **(settings_of(sharing, coefficient_steps=2, damping=0.05) | changes))


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize(("update", "fallback", "sharing"), STATES)
def test_a_resumed_run_goes_on_as_it_would_have(update: str, fallback: str, sharing: str, steps: int) -> None:
    arguments = {"weight_decay": 0.1, "update": update, "fallback": fallback}
    model, optimizer = made(sharing, **arguments)
    train(model, optimizer, steps)
    checkpoint, weights = through_file(optimizer.state_dict()), through_file(model.state_dict())
    other, resumed = made(sharing, seed=1, lr=0.5, **arguments)
    other.load_state_dict(weights)
    resumed.load_state_dict(checkpoint)
    for each, of in ((model, optimizer), (other, resumed)):
        train(each, of, 5, first=steps)
    assert_equal(model, other)
    assert resumed.diagnostics() == optimizer.diagnostics()
    assert resumed.coverage() == optimizer.coverage()


def test_a_loaded_state_is_told_of_at_once() -> None:
    model, optimizer = made("replay")
    train(model, optimizer, 3)
    _, resumed = made("replay")
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.preconditioner.diagnostics() == optimizer.preconditioner.diagnostics()
    assert resumed.preconditioner.diagnostics()["weight_spread"] > 0


def test_loading_drops_a_half_done_step() -> None:
    model, preconditioner = with_engine(sharing="replay")
    state = copy.deepcopy(preconditioner.state_dict())
    loss(model, *data(6)).backward()
    preconditioner.load_state_dict(state)
    preconditioner.step()
    assert str(preconditioner.state_dict()) == str(state)


@pytest.mark.parametrize("sharing", policy_names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_its_own_state_changes_nothing(dtype: torch.dtype, sharing: str) -> None:
    """Accelerate does so when it prepares an optimizer; fp32 sample weights and norms must not become bfloat16."""
    (model, optimizer), (other, twin) = (made(sharing, dtype=dtype) for _ in range(2))
    for step in range(4):
        for _ in range(2):
            optimizer.load_state_dict(optimizer.state_dict())
        for each, of in ((model, optimizer), (other, twin)):
            train(each, of, 1, step)
        assert_equal(model, other)
    assert {value.dtype for value in own_state(optimizer).values()} <= {torch.float32}


def test_a_state_dict_is_plain() -> None:
    model, optimizer = made("replay")
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
    """Through shared and coefficient steps; sample weights, norms and rho stay in float32 or better."""
    arguments = {"lr": 1e-2, "update": UPDATES_OF[sharing][-1]}
    model, optimizer = made(sharing, dtype=DTYPES[saved], **arguments)
    train(model, optimizer, 1)
    other, resumed = made(sharing, seed=1, dtype=DTYPES[loaded], **arguments)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for name, value in own_state(resumed).items():
        assert torch.equal(value, own_state(optimizer)[name].to(value.dtype)), name
    before = parameters(other)
    for each, of in ((model, optimizer), (other, resumed)):
        train(each, of, 4, first=1)
    assert {value.dtype for value in own_state(resumed).values()} <= {torch.float32, torch.float64}
    assert {value.dtype for value in tensors(resumed.state_dict()["state"]).values()} == {DTYPES[loaded]}
    coarse = torch.bfloat16 in (DTYPES[saved], DTYPES[loaded])
    for p, q, first in zip(trained(other), trained(model), before, strict=True):
        assert not torch.equal(p, first)
        torch.testing.assert_close(p.double(), q.double(), rtol=0, atol=0.3 if coarse else 1e-4)


# Another model or optimizer ------------------------------------------------------------------------------


class Turned(Net):
    """The same layers, constructed in another order."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("norm", "fc1"):
            self.add_module(name, self._modules.pop(name))


class Longer(Net):
    """The same layers, and one more."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.extra = make()

    def hidden(self, x: Tensor) -> Tensor:
        return self.extra(super().hidden(x))


MORE_LAYERS = partial(Longer, lambda: nn.Linear(7, 7))
OTHERS = [
    *(
        pytest.param(MORE_LAYERS, {"sharing": name}, {"sharing": name}, "layers|parameter", id=f"layers-{name}")
        for name in policy_names()
    ),
    pytest.param(partial(Longer, lambda: nn.LayerNorm(7)), {}, {}, "parameter", id="plain-parameters"),
    pytest.param(Net, {"layer_types": ["linear"]}, {}, "differ in norm: build the optimizer with", id="layer-types"),
    pytest.param(
        Net,
        {"sharing": "never"},
        {"sharing": "replay"},
        "made with sharing='never', this optimizer has sharing='replay'",
        id="policy",
    ),
    pytest.param(
        Net, {"update": "adam"}, {}, r"\['adam', 'adam', 'adam'\], this optimizer's are \['block_muon'", id="update"
    ),
    pytest.param(Net, {"fallback": "sgd"}, {}, "update rules are", id="fallback"),
    pytest.param(partial(Net, width=9), {}, {}, "shape", id="shapes"),
    pytest.param(Turned, {}, {}, "shape|order", id="order"),
]


def assert_unchanged(found: FNGD, expected: FNGD) -> None:
    own, others = (tensors(optimizer.state_dict()) for optimizer in (found, expected))
    assert own.keys() == others.keys()
    for name, value in own.items():
        assert torch.equal(value, others[name]), name


@pytest.mark.parametrize(("build", "saved", "own", "message"), OTHERS)
def test_a_state_of_another_kind_is_refused_and_changes_nothing(
    build: Callable[[], Net], saved: dict[str, Any], own: dict[str, Any], message: str
) -> None:
    foreign_model = net(cls=build)
    foreign = FNGD(foreign_model, lr=0.7, **({"layer_types": EVERY_TYPE} | saved))
    train(foreign_model, foreign, 3)
    twins = [made(seed=1, **own) for _ in range(2)]
    for model, optimizer in twins:
        train(model, optimizer, 3)
    given = foreign.state_dict()
    kept = tensors(copy.deepcopy(given))
    with pytest.raises(ValueError, match=message):
        twins[0][1].load_state_dict(given)
    assert all(torch.equal(value, kept[name]) for name, value in tensors(given).items())
    assert_unchanged(twins[0][1], twins[1][1])
    for model, optimizer in twins:
        train(model, optimizer, 4, first=3)
    assert_equal(twins[0][0], twins[1][0])


def test_the_state_of_another_optimizer_is_refused() -> None:
    sgd = torch.optim.SGD(net().parameters())
    with pytest.raises(ValueError, match="not written by FNGD"):
        FNGD(net()).load_state_dict(state_dict=sgd.state_dict())


@pytest.mark.parametrize("key", ["engine", "skipped", "engine.layers", "engine.sharing", "engine.policy"])
def test_a_state_that_lacks_a_part_is_refused_and_changes_nothing(key: str) -> None:
    twins = [made("replay") for _ in range(2)]
    for model, optimizer in twins:
        train(model, optimizer, 3)
    state = copy.deepcopy(twins[0][1].state_dict())
    for model, optimizer in twins:
        train(model, optimizer, 1, first=3)
    place = state["param_groups"][0]["fngd"]
    *path, last = key.split(".")
    for name in path:
        place = place[name]
    del place[last]
    with pytest.raises(ValueError, match=last):
        twins[0][1].load_state_dict(state)
    assert_unchanged(twins[0][1], twins[1][1])
