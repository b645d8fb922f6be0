"""Ranked: a weight for each rank of a sample's gradient norm."""

import torch

from tests.sharing.engine import L, commit, fetch, info, norms, prepared, weights


def test_follows_the_ranks_through_any_permutation() -> None:
    policy, w, n = prepared("ranked"), weights(0), norms(0)
    commit(policy, w, n, info())
    generator = torch.Generator().manual_seed(4)
    for scale in (1e-3, 1.0, 1e3):
        order = torch.randperm(8, generator=generator)
        torch.testing.assert_close(fetch(policy, scale * n[:, order], info()), w[:, order])


def test_gives_the_largest_norm_the_weight_of_the_largest() -> None:
    policy, w = prepared("ranked"), weights(0)
    commit(policy, w, norms(0), info())
    found = fetch(policy, norms(1), info())
    for layer in range(L):
        assert found[layer, norms(1)[layer].argmax()] == w[layer, norms(0)[layer].argmax()]
