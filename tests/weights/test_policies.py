"""The suite that every registered sharing policy inherits, and the registry. A policy of one's own is one more row."""

import io
import math

import pytest
import torch

from hf_fngd.weights.base import _POLICIES, SharingPolicy, policy_class, policy_names, register_policy
from tests.steps import through_file
from tests.weights.harness import Given, L, prepared, samples, step

NAMES = policy_names()
SOLVED = policy_names(lambda policy: policy.solves)


# Sample weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 8, 13])
@pytest.mark.parametrize("name", NAMES)
def test_every_sample_has_a_weight_in_every_step(name: str, size: int, dtype: torch.dtype) -> None:
    policy = prepared(name, coefficient_steps=2)
    for seed in range(5):
        (w,) = step(policy, samples(seed, size, dtype))
        assert (w.shape, w.dtype) == ((L, size), dtype)
        assert w.isfinite().all()
        if size == 1 or name == "uniform":
            torch.testing.assert_close(w, torch.ones_like(w))
        elif name == "clipped":
            assert 0 < w.min() < w.max() == 1
        else:
            torch.testing.assert_close(w.mean(dim=1), torch.ones(L, dtype=dtype))
            assert w.std() > 0.1


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40])
@pytest.mark.parametrize("name", NAMES)
def test_weights_do_not_see_the_scale_of_the_loss(name: str, scale: float) -> None:
    policies = prepared(name), prepared(name)
    for seed in range(3):
        (found,) = step(policies[0], [Given(of.u * scale) for of in samples(seed)])
        assert torch.equal(found, step(policies[1], samples(seed))[0])


@pytest.mark.parametrize("name", NAMES)
def test_weights_follow_their_samples(name: str) -> None:
    order = torch.randperm(8, generator=torch.Generator().manual_seed(4))
    (found,) = step(prepared(name), [Given(of.u[:, order]) for of in samples(0)])
    torch.testing.assert_close(found, step(prepared(name), samples(0))[0][:, order])


@pytest.mark.parametrize("name", NAMES)
def test_samples_without_a_gradient_do_no_harm(name: str) -> None:
    policy = prepared(name, coefficient_steps=3)
    nothing = [Given(torch.zeros_like(of.u)) for of in samples(0)]
    for layers in (nothing, samples(1), nothing, samples(2), nothing):
        (w,) = step(policy, layers)
        assert w.isfinite().all()
        assert all(math.isfinite(value) for value in policy.diagnostics().values())
    (w,) = step(prepared(name), nothing)
    assert torch.equal(w, torch.ones_like(w))


@pytest.mark.parametrize("name", SOLVED)
def test_an_unusable_gram_matrix_means_ones_and_is_not_stored(name: str) -> None:
    policy = prepared(name, coefficient_steps=1)
    spoilt = samples(0)
    spoilt[1].u[0, 3] = math.nan
    (w,) = step(policy, spoilt)
    torch.testing.assert_close(w[[0, 2]], torch.stack([spoilt[0].solved(), spoilt[2].solved()]))
    assert torch.equal(w[1], torch.ones(8, dtype=torch.float64))
    assert torch.equal(policy.rho.isnan(), torch.tensor([False, True, False]))
    assert float(policy.spread[1]) == 1
    assert math.isfinite(policy.diagnostics()["rho"])


@pytest.mark.parametrize("name", SOLVED)
def test_a_coefficient_step_solves_equation_9(name: str) -> None:
    policy = prepared(name)
    (w,) = step(policy, samples(0))
    torch.testing.assert_close(w, torch.stack([of.solved() for of in samples(0)]))
    torch.testing.assert_close(policy.spread, w.square().mean(dim=1))


# States ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("name", NAMES)
def test_the_state_survives_a_checkpoint(name: str, steps: int, dtype: torch.dtype) -> None:
    def go_on(policy: SharingPolicy, number: int) -> list[torch.Tensor]:
        return step(policy, samples(2 * number, 8, dtype), samples(2 * number + 1, 5, dtype))

    policy, resumed = (prepared(name, coefficient_steps=3) for _ in range(2))
    for number in range(steps):
        go_on(policy, number)
    resumed.load_state_dict(through_file(policy.state_dict()))
    assert resumed.diagnostics().keys() <= policy.diagnostics().keys()
    for number in range(steps, steps + 5):
        for found, expected in zip(go_on(resumed, number), go_on(policy, number), strict=True):
            assert found.dtype == dtype
            assert torch.equal(found, expected)
    assert resumed.diagnostics() == policy.diagnostics()


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_state_is_a_copy_and_another_model_finds_nothing_of_it(name: str) -> None:
    policy, resumed = prepared(name), prepared(name)
    step(policy, samples(0), samples(1))
    before = through_file(policy.state_dict())
    resumed.load_state_dict(policy.state_dict())
    step(resumed, samples(2), samples(3))
    assert str(policy.state_dict()) == str(before)
    assert str(prepared(policy).state_dict()) == str(prepared(name).state_dict())


@pytest.mark.parametrize("name", SOLVED)
def test_the_state_of_another_model_is_refused(name: str) -> None:
    policy = prepared(name)
    step(policy, samples(0))
    with pytest.raises(ValueError, match=f"for {L} layers, this model has {L + 1}"):
        prepared(name, layers=L + 1).load_state_dict(policy.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_no_larger_than_what_was_recorded(name: str) -> None:
    policy = prepared(name)
    for seed in range(2):
        step(policy, samples(seed))
    torch.save(policy.state_dict(), file := io.BytesIO())
    assert len(file.getvalue()) < 4 * L * 8 * 8 + 2500


# The registry ----------------------------------------------------------------------------------------------


def test_the_registry_knows_the_documented_names() -> None:
    assert NAMES == ("clipped", "never", "replay", "uniform")
    assert SOLVED == ("never", "replay")
    assert policy_names(lambda policy: "coefficient_steps" in policy.reads) == ("replay",)


def test_a_name_means_a_class_and_an_object_its_own() -> None:
    assert policy_class("replay") is policy_class(policy_class("replay")())
    with pytest.raises(ValueError, match="sharing='rank' is not a policy; there are clipped, never, replay, uniform"):
        policy_class("rank")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_cannot_be_registered_twice(name: str) -> None:
    with pytest.raises(ValueError, match=f"already a sharing policy named '{name}'"):
        register_policy(type("Again", (SharingPolicy,), {"name": name}))


def test_a_new_policy_is_one_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_fngd.weights.base._POLICIES", dict(_POLICIES))
    mine = register_policy(type("Mine", (policy_class("uniform"),), {"name": "mine"}))
    assert "mine" in policy_names()
    assert policy_class("mine") is mine
