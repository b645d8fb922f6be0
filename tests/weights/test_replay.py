"""Replay: one row for each place in an epoch."""

from contextlib import nullcontext

import pytest
import torch

from tests.sharing.engine import L, commit, fetch, info, norms, prepared, weights


def test_keeps_the_order_and_starts_over() -> None:
    policy = prepared("replay", steps=10)
    sizes = [8, 8, 8, 5]  # the last batch of an epoch
    for place, size in enumerate(sizes):
        commit(policy, weights(place, size), norms(place, size), info(size, place))
    for place in range(9):
        size = sizes[place % 4]
        torch.testing.assert_close(fetch(policy, norms(9, size), info(size, place)), weights(place % 4, size))


def test_gives_a_short_batch_its_own_weights_back_however_unequal_they_are() -> None:
    policy = prepared("replay")
    commit(policy, weights(0), norms(0), info(8, 0))
    unequal = torch.tensor([-3.0, 0.0, 0.0, 4.0, 4.0], dtype=torch.float64).expand(L, 5)
    commit(policy, unequal, norms(0, 5), info(5, 1))
    torch.testing.assert_close(fetch(policy, norms(9, 5), info(5, 1)), unequal)
    commit(policy, weights(2, 13), norms(2, 13), info(13, 2))  # a longer batch widens the store
    torch.testing.assert_close(fetch(policy, norms(9, 5), info(5, 1)), unequal)
    torch.testing.assert_close(fetch(policy, norms(9), info(8, 0)), weights(0))


def test_refreshes_the_row_of_its_place() -> None:
    policy = prepared("replay", steps=10)
    for place in range(4):
        commit(policy, weights(place), norms(place), info(8, place))
    commit(policy, weights(7), norms(7), info(8, 2))
    for place, seed in enumerate((0, 1, 7, 3)):
        torch.testing.assert_close(fetch(policy, norms(9), info(8, place)), weights(seed))


def test_overwrites_the_oldest_rows_where_memory_runs_out() -> None:
    policy = prepared("replay", steps=1000, budget=3 * L * 8 * 8)
    for place in range(5):
        with pytest.warns(UserWarning, match="memory_budget") if place == 3 else nullcontext():
            commit(policy, weights(place), norms(place), info(8, place))
    for place, seed in enumerate((3, 4, 2, 3, 4, 2)):
        torch.testing.assert_close(fetch(policy, norms(9), info(8, place)), weights(seed))


def test_grows_where_a_step_has_several_micro_batches() -> None:
    policy = prepared("replay", steps=2)
    for place in range(8):
        commit(policy, weights(place), norms(place), info(8, place))
    for place in range(8):
        torch.testing.assert_close(fetch(policy, norms(9), info(8, place)), weights(place))


def test_averages_in_places_that_were_skipped() -> None:
    policy = prepared("replay")
    commit(policy, weights(0), norms(0), info(8, 0))
    commit(policy, weights(3), norms(3), info(8, 3))
    for place in (1, 2):
        assert torch.equal(fetch(policy, norms(9), info(8, place)), torch.ones(L, 8, dtype=torch.float64))
