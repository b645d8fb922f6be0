"""The suite that every registered sharing policy inherits, and the registry."""

import io
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from hf_fngd.coefficients import coefficients, with_weights
from hf_fngd.sharing import IndexSharing, SharingPolicy, make_policy, policy_names, register_policy
from hf_fngd.sharing.base import _POLICIES
from tests.reference import ranked_fit, replay_fit
from tests.sharing.engine import L, commit, fetch, info, norms, prepared, store_tensors, weights

NAMES = policy_names()
NATURAL = [name for name in NAMES if make_policy(name).natural]
WITHOUT_WEIGHTS = ("clipped", "never", "sketched", "uniform")  # that they would keep for shared steps
STORING = [name for name in NATURAL if name not in WITHOUT_WEIGHTS]
SIZES = [1, 2, 5, 8, 13]


# Every policy ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NATURAL, "uniform"])
def test_before_any_coefficients_there_are_none(name: str) -> None:
    assert prepared(name).lookup(info()) is None


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_weights_have_mean_one_whatever_the_batch_size(name: str, size: int) -> None:
    policy = prepared(name)
    for place, committed in enumerate((8, 8, 5, 13, 1)):
        commit(policy, weights(place, committed), norms(place, committed), info(committed, place))
    for place in range(7):
        found = fetch(policy, norms(50 + place, size), info(size, place, first=place))
        assert (found is None) == (name in WITHOUT_WEIGHTS)
        if found is not None:
            torch.testing.assert_close(found.mean(dim=1), torch.ones(L, dtype=torch.float64))


@pytest.mark.parametrize("name", STORING)
def test_the_batch_that_was_committed_gets_its_own_weights_back(name: str) -> None:
    policy, w, n = prepared(name), weights(0), norms(0)
    commit(policy, w, n, info())
    torch.testing.assert_close(fetch(policy, n, info()), w)


@pytest.mark.parametrize("name", STORING)
def test_another_model_finds_nothing_of_the_first_one(name: str) -> None:
    policy = prepared(name)
    commit(policy, weights(0), norms(0), info())
    assert prepared(policy).lookup(info()) is None
    assert policy.state_dict() == {}


@pytest.mark.parametrize("name", STORING)
def test_a_later_commit_replaces_an_earlier_one(name: str) -> None:
    policy = prepared(name)
    commit(policy, weights(0), norms(0), info())
    commit(policy, weights(1), norms(1), info())
    torch.testing.assert_close(fetch(policy, norms(1), info()), weights(1))


@pytest.mark.parametrize("name", STORING)
def test_layers_without_usable_coefficients_keep_their_stored_row(name: str) -> None:
    policy, n = prepared(name), norms(0)
    commit(policy, weights(0), n, info())
    valid = torch.tensor([True, False, True])
    spoilt = weights(1)
    spoilt[1] = torch.nan
    commit(policy, spoilt, n, info(), valid)
    found = fetch(policy, n, info())
    torch.testing.assert_close(found[valid], weights(1)[valid])
    torch.testing.assert_close(found[1], weights(0)[1])


@pytest.mark.parametrize("name", STORING)
def test_layers_that_never_had_usable_coefficients_average(name: str) -> None:
    policy, n = prepared(name), norms(0)
    commit(policy, weights(0) * torch.nan, n, info(), torch.zeros(L, dtype=torch.bool))
    assert torch.equal(fetch(policy, n, info()), torch.ones(L, 8, dtype=torch.float64))


@pytest.mark.parametrize("name", STORING)
def test_what_was_committed_or_fetched_is_not_the_store_itself(name: str) -> None:
    policy, n = prepared(name), norms(0)
    w = weights(0)
    commit(policy, w, n, info())
    w.zero_()
    fetch(policy, n, info())
    commit(policy, weights(0), n, info())
    torch.testing.assert_close(fetch(policy, n, info()), weights(0))


@pytest.mark.parametrize("name", NAMES)
def test_the_store_is_allocated_once(name: str) -> None:
    policy = prepared(IndexSharing(size=64) if name == "index" else name, steps=40)
    pointers = set()
    for place in range(40):
        commit(policy, weights(place), norms(place), info(8, place, first=place))
        pointers.add(tuple(x.untyped_storage().data_ptr() for x in store_tensors(policy)))
    assert len(pointers) == 1


@pytest.mark.parametrize("first", [8, 2])
@pytest.mark.parametrize("name", NAMES)
def test_the_store_stays_within_the_memory_budget(name: str, first: int) -> None:
    budget = 10 * L * 8 * 8
    policy = prepared(name, steps=1000, budget=budget)
    for place in range(40):
        size = first if place == 0 else 8
        full = pytest.warns(UserWarning, match="memory_budget") if (name, place) == ("replay", 10) else nullcontext()
        with full:
            commit(policy, weights(place, size), norms(place, size), info(size, place, first=place % 20))
    assert sum(x.untyped_storage().nbytes() for x in store_tensors(policy)) <= budget


@pytest.mark.parametrize("name", [*NATURAL, "uniform"])
def test_solving_takes_the_gram_of_one_layer(name: str) -> None:
    u = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    k = u.t() @ u
    found, natural = prepared(name).solve(k, 0.01), coefficients(k, 0.01)
    assert torch.equal(found.w, natural.w) == (name in NATURAL)
    assert torch.equal(found.rho, with_weights(k, found.w).rho)


@pytest.mark.parametrize("name", NAMES)
def test_which_policies_compute_in_every_step(name: str) -> None:
    assert make_policy(name).always == (name in ("never", "sketched"))


# States ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("commits", [0, 1, 5])
@pytest.mark.parametrize("name", NAMES)
def test_the_state_survives_a_checkpoint(name: str, commits: int, dtype: torch.dtype) -> None:
    policy, resumed = prepared(name), prepared(name)
    for place in range(commits):
        commit(policy, weights(place, dtype=dtype), norms(place), info(8, place, 3 * place))
    file = io.BytesIO()
    torch.save(policy.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    # Both go on alike, and apart from each other.
    for place in range(commits, commits + 3):
        for each in (policy, resumed):
            commit(each, weights(place, dtype=dtype), norms(place), info(8, place, 3 * place))
    for place in range(10):
        found, expected = (fetch(each, norms(place), info(8, place, place)) for each in (resumed, policy))
        assert (found is None) == (expected is None)
        if found is not None:
            assert found.dtype == (dtype if name in STORING else torch.float64)  # else that of the norms
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", STORING)
def test_a_loaded_state_is_a_copy(name: str) -> None:
    policy, resumed, n = prepared(name), prepared(name), norms(0)
    commit(policy, weights(0), n, info())
    resumed.load_state_dict(policy.state_dict())
    commit(resumed, weights(1), n, info())
    torch.testing.assert_close(fetch(policy, n, info()), weights(0))


@pytest.mark.parametrize("name", STORING)
def test_an_empty_state_empties_the_store(name: str) -> None:
    policy = prepared(name)
    commit(policy, weights(0), norms(0), info())
    policy.load_state_dict(prepared(name).state_dict())
    assert policy.lookup(info()) is None


@pytest.mark.parametrize("name", STORING)
def test_the_state_of_another_model_is_refused(name: str) -> None:
    policy, other = prepared(name), make_policy(name)
    commit(policy, weights(0), norms(0), info())
    other.prepare(L + 1, 20, 2**20)
    with pytest.raises(ValueError, match=f"for {L} layers, this model has {L + 1}.*target_modules"):
        other.load_state_dict(policy.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_no_larger_than_what_was_recorded(name: str) -> None:
    policy = prepared(name, steps=1000)
    for place in range(2):
        commit(policy, weights(place), norms(place), info(8, place, 8 * place))
    file = io.BytesIO()
    torch.save(policy.state_dict(), file)
    assert len(file.getvalue()) < 4 * L * 8 * 8 + 2500


# Another batch size ----------------------------------------------------------------------------------------


FITS: dict[str, Callable[[Tensor, int], Tensor]] = {"last": replay_fit, "replay": replay_fit, "ranked": ranked_fit}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FITS)
def test_other_batch_sizes_follow_the_stated_rule(name: str, size: int) -> None:
    policy = prepared(name)
    w = weights(2).abs() + 0.1
    w = w / w.mean(dim=1, keepdim=True)
    ascending = torch.arange(13.0).expand(L, 13)
    commit(policy, w, ascending[:, :8], info())
    expected = torch.stack([FITS[name](row, size) for row in w])
    torch.testing.assert_close(fetch(policy, ascending[:, :size], info(size)), expected)


@pytest.mark.parametrize("name", FITS)
def test_a_short_first_batch_does_not_cap_later_ones(name: str) -> None:
    policy = prepared(name)
    commit(policy, weights(0, 3), norms(0, 3), info(3, 0))
    commit(policy, weights(1), norms(1), info(8, 1))
    torch.testing.assert_close(fetch(policy, norms(1), info(8, 1)), weights(1))


@pytest.mark.parametrize("name", ["last", "ranked"])
@pytest.mark.parametrize(("size", "kept"), [(1, True), (3, True), (4, False), (7, False)])
def test_a_batch_of_less_than_half_the_stored_size_leaves_the_row(name: str, size: int, kept: bool) -> None:
    policy = prepared(name)
    commit(policy, weights(0), norms(0), info(8))
    before = policy.row.clone()
    commit(policy, weights(1, size), norms(1, size), info(size, 1))
    assert torch.equal(policy.row, before) == kept


# The registry ----------------------------------------------------------------------------------------------


def test_the_registry_knows_the_documented_names() -> None:
    assert NAMES == ("clipped", "index", "last", "never", "ranked", "replay", "sketched", "uniform")


def test_an_unknown_name_lists_those_that_exist() -> None:
    with pytest.raises(
        ValueError, match="sharing='rank' is not a policy; there are clipped, index, last, never, ranked"
    ):
        make_policy("rank")


def test_a_name_yields_a_new_object_and_an_object_itself() -> None:
    assert make_policy("last") is not make_policy("last")
    policy = IndexSharing(5)
    assert make_policy(policy) is policy


@pytest.mark.parametrize("name", NAMES)
def test_a_name_cannot_be_registered_twice(name: str) -> None:
    with pytest.raises(ValueError, match=f"already a sharing policy named '{name}'"):
        register_policy(type("Again", (SharingPolicy,), {"name": name}))


def test_a_new_policy_is_one_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_fngd.sharing.base._POLICIES", dict(_POLICIES))
    mine = register_policy(type("Mine", (type(make_policy("last")),), {"name": "mine"}))
    assert "mine" in policy_names()
    assert type(make_policy("mine")) is mine
