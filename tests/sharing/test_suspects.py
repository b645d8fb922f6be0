"""Which samples got low weights: what index sharing sums up, and what a user gets of it."""

import csv
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from hf_fngd import FNGD, FNGDPreconditioner, Suspects, add_index, policy_names
from hf_fngd.sharing import WEIGHT_COLUMN, BatchInfo, IndexSharing
from tests.nets import net, train
from tests.sharing.engine import L, commit, info, norms, prepared, weights

ALL = torch.ones(L, dtype=torch.bool)


def some(*, index: tuple[int, ...] = (3, 0, 1), weight: tuple[float, ...] = (-0.5, 0.25, 2.0)) -> Suspects:
    return Suspects(torch.tensor(index), torch.tensor(weight), torch.arange(1, len(index) + 1))


def rows(found: Suspects) -> dict[int, tuple[float, int]]:
    """Weight and count of each sample."""
    return dict(zip(found.index.tolist(), zip(found.weight.tolist(), found.count.tolist(), strict=True), strict=True))


# What is summed up -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 64])
def test_the_mean_is_over_layers_and_the_coefficient_steps_that_saw_the_sample(size: int | None) -> None:
    policy = prepared(IndexSharing(size))
    seen: dict[int, list[float]] = {}
    for seed, batch in enumerate(([0, 3, 5], [4, 3, 40], [3, 5, 0])):
        w = weights(seed, 3)
        policy.commit(w, ALL, BatchInfo(3, seed, torch.tensor(batch)))
        for sample, mean in zip(batch, w.mean(dim=0).tolist(), strict=True):
            seen.setdefault(sample, []).append(mean)
    found = policy.suspects()
    assert rows(found) == {s: (pytest.approx(sum(of) / len(of)), len(of)) for s, of in seen.items()}
    assert found.weight.tolist() == sorted(found.weight.tolist())


def test_a_layer_without_usable_coefficients_does_not_count() -> None:
    policy = prepared("index")
    spoilt = weights(0)
    spoilt[1] = torch.nan
    commit(policy, spoilt, norms(0), info(), torch.tensor([True, False, True]))
    commit(policy, weights(1) * torch.nan, norms(0), info(first=4), ~ALL)
    expected = spoilt[[0, 2]].mean(dim=0)
    assert rows(policy.suspects()) == {n: (pytest.approx(float(expected[n])), 1) for n in range(8)}


def test_a_sample_that_is_in_a_batch_twice_counts_twice() -> None:
    policy = prepared("index")
    w = torch.tensor([[0.5, 1.0, 1.5]]).double().expand(L, 3)
    policy.commit(w, ALL, BatchInfo(3, 0, torch.tensor([7, 2, 7])))
    assert rows(policy.suspects()) == {7: (1.0, 2), 2: (1.0, 1)}


def test_nothing_was_measured_before_the_first_coefficient_step() -> None:
    assert len(prepared("index").suspects()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_means_go_on_from_a_checkpoint(dtype: torch.dtype) -> None:
    policy, resumed = prepared("index"), prepared("index")
    commit(policy, weights(0, dtype=dtype), norms(0), info())
    file = io.BytesIO()
    torch.save(policy.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for each in (policy, resumed):
        commit(each, weights(1, dtype=dtype), norms(0), info(first=5))
    assert rows(resumed.suspects()) == rows(policy.suspects())
    assert len(policy.suspects()) == 13


def test_a_state_without_means_loads_and_starts_from_nothing() -> None:
    policy, resumed = prepared("index"), prepared("index")
    commit(policy, weights(0), norms(0), info())
    resumed.load_state_dict({"table": policy.state_dict()["table"]})
    assert torch.equal(resumed.lookup(info()), policy.lookup(info()))
    assert len(resumed.suspects()) == 0
    commit(resumed, weights(1, 4), norms(0, 4), info(4))
    assert rows(resumed.suspects()).keys() == {0, 1, 2, 3}


# From the optimizer ----------------------------------------------------------------------------------------


def test_shared_steps_measure_nothing() -> None:
    model = net()
    optimizer = FNGD(model, sharing="index", coefficient_steps=2, refresh=3)
    train(model, optimizer, 7)  # on the samples from n to n + 5 in step n; steps 0, 1 and 4 compute
    counts = {sample: count for sample, (_, count) in rows(optimizer.suspects()).items()}
    assert counts == {0: 1, **dict.fromkeys((1, 2, 3), 2), 4: 3, 5: 3, 6: 2, 7: 1, 8: 1, 9: 1}


def test_they_come_sorted_through_the_optimizers_state() -> None:
    model, other = net(), net()
    optimizer, resumed = FNGD(model, sharing="index"), FNGD(other, sharing="index")
    train(model, optimizer, 3)
    resumed.load_state_dict(optimizer.state_dict())
    assert rows(resumed.suspects()) == rows(optimizer.suspects())
    assert optimizer.suspects().weight.diff().min() >= 0


@pytest.mark.parametrize("sharing", [name for name in policy_names() if name != "index"])
def test_other_policies_have_none(sharing: str) -> None:
    preconditioner = FNGDPreconditioner(net(), sharing=sharing)
    with pytest.raises(ValueError, match=f"sharing='{sharing}': use sharing=\"index\", and train on hf_fngd.add_index"):
        preconditioner.suspects()


# As a file -------------------------------------------------------------------------------------------------


def test_a_file_has_a_line_a_sample(tmp_path: Path) -> None:
    path = tmp_path / "new" / "suspects.csv"
    some().to_csv(path)
    some().to_csv(path)
    with path.open(newline="") as file:
        lines = list(csv.reader(file))
    assert lines == [["index", "weight", "count"], ["3", "-0.5", "1"], ["0", "0.25", "2"], ["1", "2.0", "3"]]


# As a column -----------------------------------------------------------------------------------------------


def column(dataset: Any) -> list[float | None]:
    """None for NaN, which equals nothing."""
    return [None if math.isnan(weight) else weight for weight in dataset[WEIGHT_COLUMN]]


DATA = Dataset.from_dict({"text": ["a", "b", "c", "d", "e"]})
EXPECTED = [0.25, 2.0, None, -0.5, None]


@pytest.mark.parametrize("indexed", [False, True])
def test_a_column_has_a_weight_a_row(indexed: bool) -> None:
    data = add_index(DATA) if indexed else DATA
    added = some().add_to(data)
    assert column(added) == EXPECTED
    assert added.features[WEIGHT_COLUMN].dtype == "float64"
    assert added["text"][:] == DATA["text"][:]


def test_a_selection_is_told_by_its_index_column() -> None:
    assert column(some().add_to(add_index(DATA).select([3, 2, 0]))) == [-0.5, None, 0.25]


def test_a_column_replaces_an_older_one() -> None:
    older = some(weight=(1.0, 1.0, 1.0)).add_to(DATA)
    assert column(some().add_to(older)) == EXPECTED


def test_nothing_measured_makes_a_column_of_nan() -> None:
    empty = Tensor()
    assert column(Suspects(empty.long(), empty, empty.int()).add_to(DATA)) == [None] * 5


def test_a_dataset_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sample 3 was weighted, the dataset has 3 rows.*'fngd_index'"):
        some().add_to(DATA.select(range(3)))


def test_what_has_no_columns_is_refused() -> None:
    with pytest.raises(TypeError, match=r"map-style datasets\.Dataset, got list"):
        some().add_to([1, 2])
