"""Index: a weight for each row of the dataset, and the column that says which row is which."""

from typing import Any

import pytest
import torch

from hf_fngd.sharing import INDEX_COLUMN, BatchInfo, IndexSharing, add_index
from tests.sharing.engine import L, commit, info, norms, prepared, weights


def test_follows_each_sample_through_other_batches() -> None:
    policy = prepared("index")
    w = torch.full((L, 6), torch.nan, dtype=torch.float64)
    for batch in ([0, 3, 5], [4, 1, 2]):
        w[:, batch] = weights(batch[0], 3)
        policy.commit(w[:, batch], torch.ones(L, dtype=torch.bool), BatchInfo(3, 0, torch.tensor(batch)))
    again = [5, 1, 0, 4]
    found = policy.lookup(BatchInfo(4, 0, torch.tensor(again)))
    torch.testing.assert_close(found, w[:, again] / w[:, again].mean(dim=1, keepdim=True))


@pytest.mark.parametrize("size", [None, 32])
def test_averages_samples_that_were_never_weighted(size: int | None) -> None:
    policy = prepared(IndexSharing(size))
    commit(policy, weights(0, 4), norms(0, 4), info(4))
    assert torch.equal(policy.lookup(info(4, first=8)), torch.ones(L, 4, dtype=torch.float64))
    assert torch.equal(policy.lookup(info(4, first=1000)), torch.ones(L, 4, dtype=torch.float64))


def test_grows_to_the_samples_that_appear() -> None:
    policy = prepared("index")
    for first in (0, 40, 8, 200):
        commit(policy, weights(first, 4), norms(0, 4), info(4, first=first))
    for first in (0, 40, 8, 200):
        torch.testing.assert_close(policy.lookup(info(4, first=first)), weights(first, 4))


def test_uses_the_whole_budget_before_it_gives_up() -> None:
    rows = 20
    policy = prepared("index", budget=rows * ((L + 1) * 8 + 4))  # a weight a layer, their mean, and a count
    for first in range(0, rows, 4):
        commit(policy, weights(first, 4), norms(0, 4), info(4, first=first))
    torch.testing.assert_close(policy.lookup(info(4, first=16)), weights(16, 4))
    with pytest.raises(ValueError, match=r"memory_budget is 720; raise it, or use sharing=\"ranked\""):
        commit(policy, weights(0, 4), norms(0, 4), info(4, first=rows))


def test_beyond_the_stated_size_is_an_error_that_names_it() -> None:
    policy = prepared(IndexSharing(size=10))
    with pytest.raises(ValueError, match="size=10"):
        commit(policy, weights(0, 4), norms(0, 4), info(4, first=8))


@pytest.mark.parametrize("size", [0, -1])
def test_needs_a_dataset_with_rows(size: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        IndexSharing(size)


# The index column ------------------------------------------------------------------------------------------


class Columns:
    """As much of a datasets.Dataset as `add_index` touches."""

    def __init__(self) -> None:
        self.added: dict[str, Any] = {}

    def __len__(self) -> int:
        return 4

    def add_column(self, name: str, values: Any) -> "Columns":
        self.added[name] = values
        return self


def test_add_index_counts_the_rows() -> None:
    assert add_index(Columns()).added == {INDEX_COLUMN: [0, 1, 2, 3]}


def test_add_index_refuses_what_has_no_rows_to_count() -> None:
    with pytest.raises(TypeError, match='got list_iterator; with an iterable dataset use sharing="ranked"'):
        add_index(iter([1]))
