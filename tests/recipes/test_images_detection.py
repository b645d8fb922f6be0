"""How well scores find wrong labels, and what a run comes to."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from hf_fngd import FNGD
from hf_fngd.sharing import INDEX_COLUMN, IndexSharing
from images.detection import detection, precision_at, rank_auc, weight_scores
from images.summary import best_epochs, memorized


def tensors(scores, wrong):
    return torch.tensor(scores, dtype=torch.float32), torch.tensor(wrong, dtype=torch.bool)


@pytest.mark.parametrize(
    ("scores", "wrong", "auc"),
    [
        ([1, 2, 3, 4], [0, 0, 1, 1], 1.0),
        ([1, 2, 3, 4], [1, 1, 0, 0], 0.0),
        ([1, 2, 3, 4], [0, 1, 0, 1], 0.75),
        ([5, 5, 5, 5], [0, 1, 0, 1], 0.5),
        ([1, 2, 2, 3], [0, 1, 0, 1], 0.875),
        ([1, 2], [0, 0], None),
        ([1, 2], [1, 1], None),
    ],
)
def test_auc_of_known_cases(scores, wrong, auc):
    assert rank_auc(*tensors(scores, wrong)) == auc


def test_auc_is_the_share_of_pairs_in_the_right_order():
    torch.manual_seed(0)
    scores, wrong = torch.randint(0, 8, (60,)).float(), torch.rand(60) < 0.3
    pairs = list(itertools.product(scores[wrong].tolist(), scores[~wrong].tolist()))
    expected = sum((high > low) + 0.5 * (high == low) for high, low in pairs) / len(pairs)
    assert rank_auc(scores, wrong) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("k", "scores", "wrong", "precision"),
    [
        (2, [1, 4, 3, 2], [0, 1, 1, 0], 1.0),
        (2, [1, 4, 3, 2], [1, 0, 1, 0], 0.5),
        (2, [1, 2, 2, 3], [0, 1, 0, 1], 0.75),  # one of the tied two, either as likely
        (3, [7, 7, 7, 7], [0, 0, 0, 1], 0.25),
        (4, [1, 2, 3, 4], [0, 1, 0, 0], 0.25),
        (0, [1, 2], [0, 1], None),
    ],
)
def test_precision_of_known_cases(k, scores, wrong, precision):
    found = precision_at(k, *tensors(scores, wrong))
    assert found == (precision if precision is None else pytest.approx(precision))


def test_samples_without_a_score_are_left_out():
    scores, wrong = tensors([1, float("nan"), 3, 2, float("nan")], [0, 1, 1, 0, 0])
    assert detection("loss", scores, wrong) == {"loss_auc": 1.0, "loss_precision": 1.0}


@pytest.mark.parametrize("size", [None, 8])
def test_low_weights_score_high(size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 1))
    optimizer = FNGD(model, sharing=IndexSharing(size))
    assert weight_scores(optimizer, 8)["weight"].isnan().all()  # nothing was measured yet
    inputs = torch.randn(6, 5)
    inputs[2] *= 50  # its gradient outweighs the others'
    model(inputs, **{INDEX_COLUMN: torch.arange(6)}).square().mean().backward()
    optimizer.step()
    scores = weight_scores(optimizer, 8)["weight"]
    assert scores[:6].argmax() == 2
    assert scores[6:].isnan().all()  # never weighted
    torch.testing.assert_close(-scores[:6].mean(), torch.tensor(1.0))


def test_optimizers_that_follow_no_samples_have_no_weights():
    model = nn.Linear(2, 1)
    assert weight_scores(torch.optim.SGD(model.parameters(), lr=0.1), 3) == {}
    assert weight_scores(FNGD(model), 3) == {}


def event(step, **values):
    return {"step": step, "epoch": step / 10, **values}


def test_the_selected_epoch_is_the_first_best_by_noisy_labels_and_the_best_one_the_oracles():
    noisy, test = [0.2, 0.5, 0.4, 0.5], [0.7, 0.6, 0.9, 0.8]
    history = [event(10, loss=1.0)]
    for place, (on_noisy, on_test) in enumerate(zip(noisy, test, strict=True), start=1):
        history += [event(10 * place, eval_noisy_accuracy=on_noisy, eval_noisy_loss=1.0)]
        history += [event(10 * place, eval_test_accuracy=on_test)]
    history.append(event(50, eval_noisy_accuracy=0.99))  # killed between the two evaluations
    assert best_epochs(history) == {
        "selected_epoch": 2.0,
        "selected_noisy_accuracy": 0.5,
        "selected_test_accuracy": 0.6,
        "best_test_accuracy": 0.9,
    }
    assert best_epochs([event(10, loss=1.0)]) == {}


def test_memorized_labels_are_counted_among_the_wrong_ones():
    true, given = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([0, 1, 1, 2, 0])
    answers = torch.tensor([0, 0, 1, 0, 2])
    found = memorized(torch.nn.functional.one_hot(answers, 3), given, true)
    assert found == pytest.approx(
        {"train_accuracy": 0.4, "wrong_labels": 0.6, "wrong_fitted": 1 / 3, "wrong_corrected": 1 / 3}
    )
    clean = memorized(torch.nn.functional.one_hot(true, 3), true, true)
    assert clean == {"train_accuracy": 1.0, "wrong_labels": 0.0, "wrong_fitted": None, "wrong_corrected": None}
