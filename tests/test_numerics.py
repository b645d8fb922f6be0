"""Batches that go wrong: no state may be poisoned by them, whatever the update rule, the fallback and the policy."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_fngd import FNGD, policy_names
from hf_fngd.updates import FALLBACK_RULES
from tests.nets import UPDATES, UPDATES_OF, Net, data, loss, net, settings_of

RULES = [(update, fallback) for update in UPDATES for fallback in FALLBACK_RULES]
DEFAULT = ("block_muon", "adamw")
EVERY = [*((*rules, "replay") for rules in RULES), (*DEFAULT, "clipped")]
CAP = 3  # steps 0 to 2 compute coefficients, the later ones share them


def made(
    update: str, fallback: str, sharing: str = "replay", damping: float = 0.05, **changes: Any
) -> tuple[Net, FNGD]:
    model = net(dtype=torch.float32)
    settings = {"lr": 0.01, "weight_decay": 0.1} | settings_of(sharing, damping=damping, coefficient_steps=CAP)
    return model, FNGD(model, update=update, fallback=fallback, **(settings | changes))


def step(model: Net, optimizer: FNGD, seed: int, scale: float = 1.0, samples: int = 6, equal: bool = False) -> None:
    x, y = data(1 if equal else samples, 2, seed=seed, dtype=torch.float32)
    if equal:
        x, y = x.repeat(samples, 1, 1), y.repeat(samples)
    optimizer.zero_grad()
    (scale * loss(model, x, y)).backward()
    optimizer.step()


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Every number and tensor of a state, by its path.

    Without what a skipped step may change: its counter, and what is known of the shapes of the layers' inputs.
    """
    if path.endswith(("skipped", ".engine.layers")):
        return {}
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for name, of in items for key, leaf in leaves(of, f"{path}.{name}").items()}
    return {path: value.clone() if isinstance(value, Tensor) else value}


def everything(model: Net, optimizer: FNGD) -> dict[str, Any]:
    engine = optimizer.preconditioner
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    policy = engine.policy
    ratios = {"rho": policy.rho, "spread": policy.spread} if policy.solves else {}
    return leaves({"parameters": parameters, "optimizer": optimizer.state_dict(), "ratios": ratios})


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        if isinstance(leaf, Tensor):
            assert torch.equal(found[path].nan_to_num(nan=-1), leaf.nan_to_num(nan=-1)), path
        else:
            assert found[path] == leaf, path


def assert_finite(model: Net, optimizer: FNGD) -> None:
    for path, leaf in everything(model, optimizer).items():
        if isinstance(leaf, Tensor):
            assert torch.isfinite(leaf).all(), path


# Gradients that are not finite ---------------------------------------------------------------------------


def spoilt_input(value: float) -> Callable[[Net], None]:
    def backward(model: Net) -> None:
        x, y = data(6, 2, seed=99, dtype=torch.float32)
        x[2, 1, 0] = value
        loss(model, x, y).backward()

    return backward


def scaled_loss(scale: float) -> Callable[[Net], None]:
    def backward(model: Net) -> None:
        (scale * loss(model, *data(6, 2, seed=99, dtype=torch.float32))).backward()

    return backward


def spoilt_gradient(name: str, value: float) -> Callable[[Net], None]:
    """One entry of one parameter's gradient, after a backward in which nothing went wrong."""

    def backward(model: Net) -> None:
        scaled_loss(1.0)(model)
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        gradient.view(-1)[0] = value

    return backward


def second_micro_batch(model: Net) -> None:
    scaled_loss(1.0)(model)
    spoilt_input(torch.nan)(model)


BAD = {
    "nan in the input": spoilt_input(torch.nan),
    "infinity in the input": spoilt_input(torch.inf),
    "nan in the loss": scaled_loss(torch.nan),
    "infinity in the loss": scaled_loss(torch.inf),
    "squares beyond float32": scaled_loss(1e25),
    "gradients of 1e30": scaled_loss(1e30),
    "one preconditioned gradient": spoilt_gradient("fc2.weight", torch.nan),
    "one plain gradient": spoilt_gradient("norm.weight", torch.inf),
    "the second of two micro-batches": second_micro_batch,
}


# Every rule in a coefficient step, and the default ones in the first and in a shared step, and with the other policies.
CASES = [
    *((*rules, "replay", 2) for rules in RULES),
    *((*DEFAULT, "replay", before) for before in (0, 4)),
    *((*DEFAULT, sharing, 2) for sharing in policy_names() if sharing != "replay"),
]


@pytest.mark.parametrize("backward", BAD.values(), ids=BAD)
@pytest.mark.parametrize(("update", "fallback", "sharing", "before"), CASES)
def test_a_bad_step_is_skipped_whole(
    update: str, fallback: str, sharing: str, backward: Callable[[Net], None], before: int
) -> None:
    """As if the batch had never been: a twin that never saw it has the same parameters and the same state."""
    twins = [made(update, fallback, sharing) for _ in range(2)]
    for seed in range(before):
        for twin in twins:
            step(*twin, seed)
    model, optimizer = twins[0]
    optimizer.zero_grad()
    backward(model)
    optimizer.step()
    assert_same(everything(*twins[0]), everything(*twins[1]))
    for seed in range(before, before + 4):
        for twin in twins:
            step(*twin, seed)
    assert [int(twin[1].skipped) for twin in twins] == [1, 0]
    assert_same(everything(*twins[0]), everything(*twins[1]))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("called", [True, False], ids=["by itself", "by its caller"])
@pytest.mark.parametrize("sharing", policy_names())
def test_no_policy_keeps_anything_of_a_bad_step(sharing: str, called: bool, parts: int) -> None:
    """Whether step() finds the gradients not finite, or is not even called."""
    twins = [made(UPDATES_OF[sharing][-1], "sgd", sharing) for _ in range(2)]

    def one(model: Net, optimizer: FNGD, seed: int, scale: float = 1.0, called: bool = True) -> None:
        optimizer.zero_grad()
        for part in range(parts):
            (scale * loss(model, *data(6, 2, seed=10 * seed + part, dtype=torch.float32))).backward()
        if called:
            optimizer.step()

    for seed in range(6):
        if seed in (1, 4):
            before = everything(*twins[0])
            one(*twins[0], 50 + seed, torch.nan, called)
            assert_same(everything(*twins[0]), before)
        for twin in twins:
            one(*twin, seed)
    assert int(twins[0][1].skipped) == 2 * called
    assert_same(everything(*twins[0]), everything(*twins[1]))


@pytest.mark.parametrize(("update", "fallback"), RULES)
@pytest.mark.parametrize("before", [0, 2, 4], ids=["first", "coefficients", "shared"])
def test_a_step_that_the_loss_scaler_skips_leaves_no_trace(update: str, fallback: str, before: int) -> None:
    (model, optimizer), (twin, of_twin) = made(update, fallback), made(update, fallback)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=1000)

    def scaled(seed: int, factor: float = 1.0) -> None:
        optimizer.zero_grad()
        scaler.scale(factor * loss(model, *data(6, 2, seed=seed, dtype=torch.float32))).backward()
        scaler.step(optimizer)
        scaler.update()

    for seed in range(before):
        scaled(seed)
        step(twin, of_twin, seed)
    scaled(99, factor=1e36)
    assert scaler.get_scale() == 2.0**15  # it was skipped
    for seed in range(before, before + 6):
        scaled(seed)
        step(twin, of_twin, seed)
        # A power of two in the loss changes no bit of anything.
        assert_same(everything(model, optimizer), everything(twin, of_twin))


# Gradients that are finite and unusual -------------------------------------------------------------------

# The squares of the last ones are within float32. The plain gradient of "sgd" moves by as much, and is left out there.
UNUSUAL: dict[str, dict[str, Any]] = {
    "zero": {"scale": 0.0},
    "of a single sample": {"samples": 1},
    "zero, of a single sample": {"scale": 0.0, "samples": 1},
    "of equal samples": {"equal": True},
    **{f"of {scale}": {"scale": scale} for scale in (1e-20, 1e-30, 1e-38, 1e-45, 1e10, 1e17)},
}


@pytest.mark.parametrize("before", [0, 2, 4], ids=["first", "coefficients", "shared"])
@pytest.mark.parametrize("unusual", UNUSUAL.values(), ids=UNUSUAL)
@pytest.mark.parametrize(("update", "fallback", "sharing"), EVERY)
def test_unusual_gradients_poison_nothing(
    update: str, fallback: str, sharing: str, unusual: dict[str, Any], before: int
) -> None:
    changes = {"fallback_lr": 0.0} if unusual.get("scale", 0.0) > 1 else {}
    model, optimizer = made(update, fallback, sharing, damping=1e-6 if "equal" in unusual else 0.05, **changes)
    for seed in range(before):
        step(model, optimizer, seed)
    for number in (1, 2):
        step(model, optimizer, 99 + number, **unusual)
        policy = optimizer.preconditioner.policy
        assert sharing == "clipped" or policy.steps == before + number
        if before + number <= CAP and sharing != "clipped" and unusual.keys() & {"samples", "equal"} == unusual.keys():
            # What they share is the plain gradient: rho is that of one sample.
            torch.testing.assert_close(policy.rho, torch.ones(2), rtol=1e-3, atol=0)
            assert "equal" in unusual or torch.allclose(policy.spread, torch.ones(2), rtol=1e-5)
    for seed in range(4):
        step(model, optimizer, seed)
        assert_finite(model, optimizer)


def trajectory(update: str, scale: float, steps: int = 6) -> tuple[list[Tensor], Tensor]:
    """The parameters after a run at some scale of the loss, and the rows of the store."""
    model, optimizer = made(update, "adamw", eps=1e-30)
    for seed in range(steps):
        step(model, optimizer, seed, scale)
        assert_finite(model, optimizer)
    return [p.detach() for p in model.parameters()], optimizer.preconditioner.state_dict()["policy"]["rows"]


@pytest.mark.parametrize("power", [-50, 50])
@pytest.mark.parametrize("update", [update for update in UPDATES if update != "momentum"])
def test_gradients_of_1e15_and_their_inverse_train_as_others_do(update: str, power: int) -> None:
    """With the fallback that is scale-free too; its eps out of the way."""
    found, rows = trajectory(update, 2.0**power)
    expected, of_others = trajectory(update, 1.0)
    torch.testing.assert_close(rows, of_others, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("update", "fallback", "sharing"), EVERY)
def test_gradients_of_1e20_are_skipped(update: str, fallback: str, sharing: str) -> None:
    model, optimizer = made(update, fallback, sharing)
    step(model, optimizer, 0)
    before = everything(model, optimizer)
    step(model, optimizer, 1, 1e21)
    assert int(optimizer.skipped) == 1
    assert_same(everything(model, optimizer), before)
