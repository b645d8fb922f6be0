"""The training loss, outsized losses, and the bound against them."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers.trainer_pt_utils import LabelSmoother

from common.loss import OutlierArguments, bound, make_loss
from images.losses import TrainingLoss, largest_rise


def test_a_bound_shrinks_what_is_above_it_alone() -> None:
    losses = torch.tensor([1.0, 2.0, 3.0, 40.0, 0.0], requires_grad=True)
    bounded = bound(losses, 2)  # of the median, 2
    torch.testing.assert_close(bounded, torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0]))
    bounded.sum().backward()
    torch.testing.assert_close(losses.grad, torch.tensor([1.0, 1.0, 1.0, 0.1, 1.0]))


def test_a_bound_bears_losses_of_either_0() -> None:
    losses = torch.tensor([0.0, -0.0, 1.0, 1.0, 5.0])
    torch.testing.assert_close(bound(losses, 2), torch.tensor([0.0, 0.0, 1.0, 1.0, 2.0]))


def test_a_bound_takes_back_what_the_outliers_were_multiplied_by() -> None:
    losses = torch.full((8,), 3.0)
    torch.testing.assert_close(OutlierArguments(outliers=2, loss_bound=1).distort(losses), losses)
    assert OutlierArguments(outliers=2).distort(losses).sum() == 6 * 3 + 2 * 300


def test_samples_are_looked_at_only_where_they_have_to_be() -> None:
    assert not OutlierArguments().of_samples
    assert OutlierArguments(outliers=1).of_samples
    assert OutlierArguments(loss_bound=2).of_samples


@pytest.mark.parametrize(
    ("options", "message"),
    [({"loss_bound": 0}, r"loss_bound is 0; it must be above 0\."), ({"outliers": -1}, "outliers is -1")],
)
def test_options_out_of_range_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        OutlierArguments(**options)


def test_output_gradients_are_clipped_at_their_mean_norm() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 3, 5), torch.randint(5, (4, 3))
    gradients = []
    for options in ({}, {"clip_outputs": True}, {"clip_outputs": True, "outliers": 4}):
        leaf = logits.clone().requires_grad_()
        make_loss(0.1, OutlierArguments(**options))({"logits": leaf * 1}, labels).backward()
        gradients.append(leaf.grad)
    plain, clipped, of_larger_losses = gradients
    norms = plain.flatten(1).norm(dim=1)
    torch.testing.assert_close(clipped.flatten(1).norm(dim=1), norms.clamp(max=norms.mean()))
    torch.testing.assert_close(clipped / clipped.norm(dim=2, keepdim=True), plain / plain.norm(dim=2, keepdim=True))
    torch.testing.assert_close(of_larger_losses, 100 * clipped)  # a weight knows no scale


def test_a_fraction_of_an_outlier_is_in_as_many_batches() -> None:
    torch.manual_seed(0)
    counts = [int((OutlierArguments(outliers=1.25).distort(torch.ones(8)) > 1).sum()) for _ in range(400)]
    assert set(counts) == {1, 2}
    assert counts.count(2) == pytest.approx(100, abs=30)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_trainers_label_smoothing_over_the_tokens_of_the_whole_batch(smoothing):
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5, 11), torch.randint(0, 11, (6, 5))
    labels[0, 2:] = labels[3, 1:] = labels[5, 4:] = -100
    loss = make_loss(smoothing)
    whole = loss({"logits": logits}, labels)
    torch.testing.assert_close(whole, LabelSmoother(epsilon=smoothing)({"logits": logits}, labels))
    tokens = labels.ne(-100).sum()
    parts = [loss({"logits": logits[i : i + 2]}, labels[i : i + 2], tokens) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts), whole)


def test_outliers_count_many_times_in_training_alone():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5, 11, requires_grad=True), torch.randint(0, 11, (6, 5))
    labels[0, 2:] = -100
    plain, loss = make_loss(0.1), make_loss(0.1, OutlierArguments(outliers=2, outlier_scale=100.0))
    tokens = labels.ne(-100).sum()
    alone = torch.stack([plain({"logits": logits[n : n + 1]}, labels[n : n + 1], tokens) for n in range(6)])
    torch.manual_seed(1)
    outliers = torch.randperm(6)[:2]
    torch.manual_seed(1)
    torch.testing.assert_close(loss({"logits": logits}, labels), alone.sum() + 99 * alone[outliers].sum())
    with torch.no_grad():
        torch.testing.assert_close(loss({"logits": logits}, labels), alone.sum())


@pytest.mark.parametrize("options", [{"outliers": 2}, {"loss_bound": 0.5}, {"clip_outputs": True}])
def test_images_are_evaluated_by_the_plain_cross_entropy_which_is_recorded_in_training(options) -> None:
    torch.manual_seed(0)
    outputs, labels = {"logits": torch.randn(6, 4, requires_grad=True)}, torch.tensor([0, 1, 2, 3, 0, 1])
    arguments = OutlierArguments(**options)
    loss, plain = TrainingLoss(arguments, 0.1), F.cross_entropy(outputs["logits"], labels)
    with torch.no_grad():
        torch.testing.assert_close(loss(outputs, labels), plain)
    assert loss.batches == []
    torch.manual_seed(1)
    found = loss(outputs, labels)
    torch.manual_seed(1)
    torch.testing.assert_close(found, make_loss(0.1, arguments)(outputs, labels))
    assert loss.batches == [pytest.approx(plain.item())]


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        ([1.0, 2.0], None),
        ([1.0, 1.0, 9.0, 2.0, 1.0], 9.0),
        ([4.0, 2.0, 1.0], 1 / 3),
        ([0.0, 0.0, 3.0], None),
        ([1.0, 1.0, math.inf], math.inf),
    ],
)
def test_largest_rise_is_over_the_median_of_the_steps_before(batches, expected):
    assert largest_rise(batches, window=2) == (expected if expected is None else pytest.approx(expected))
