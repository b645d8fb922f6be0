"""Last: one row for all batches."""

import pytest
import torch

from tests.sharing.engine import L, commit, fetch, info, norms, prepared, weights


def test_gives_place_n_the_weight_of_place_n() -> None:
    policy = prepared("last")
    for place in range(3):
        commit(policy, weights(place), norms(place), info(8, place))
    for place in range(5):
        torch.testing.assert_close(fetch(policy, norms(9), info(8, place, first=40)), weights(2))


@pytest.mark.parametrize("prefix", [[-1.0, 0.5], [1.0, -0.99], [0.0, 0.0], [3.0, 0.2]])
def test_a_prefix_whose_weights_cancel_is_not_blown_up(prefix: list[float]) -> None:
    policy = prepared("last")
    commit(policy, torch.tensor([[*prefix, 2.5, 2.0]]).expand(L, 4), norms(0, 4), info(4))
    fitted = policy.lookup(info(2))
    torch.testing.assert_close(fitted.mean(dim=1), torch.ones(L))
    assert fitted.abs().max() <= 2 * max(map(abs, prefix)) + 1
