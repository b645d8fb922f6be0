"""Losses against label noise, and the record of losses."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from images.arguments import LossArguments
from images.losses import TrainingLoss, generalized_cross_entropy, smallest
from images.record import LossRecord, largest_rise


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(6, 4, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 2, 3, 0, 1])


def make_loss(smoothing=0.0, epoch=0.0, samples=6, **options):
    return TrainingLoss(LossArguments(**options), smoothing, LossRecord(samples), lambda: epoch)


def call(loss, logits, labels, items=None):
    loss.index = torch.arange(len(labels))
    return loss({"logits": logits}, labels, items)


def test_generalized_cross_entropy_lies_between_cross_entropy_and_absolute_error(batch):
    logits, labels = batch
    p = logits.softmax(dim=1)[torch.arange(6), labels]
    torch.testing.assert_close(generalized_cross_entropy(logits, labels, 0.7), (1 - p**0.7) / 0.7)
    torch.testing.assert_close(generalized_cross_entropy(logits, labels, 1e-9), -p.log())
    absolute = (logits.softmax(dim=1) - F.one_hot(labels, 4)).abs().sum(dim=1)
    torch.testing.assert_close(generalized_cross_entropy(logits, labels, 1.0), absolute / 2)


def test_generalized_cross_entropy_is_finite_where_a_probability_is_zero():
    logits = torch.tensor([[1000.0, 0.0]], requires_grad=True)
    loss = generalized_cross_entropy(logits, torch.tensor([1]), 0.7)
    loss.sum().backward()
    assert loss.item() == pytest.approx(1 / 0.7)
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("dropped", "expected"),
    [(0.0, [1, 1, 1, 1, 1]), (0.4, [5 / 3, 0, 5 / 3, 0, 5 / 3]), (0.99, [0, 0, 5, 0, 0])],
)
def test_the_largest_losses_are_dropped_and_the_rest_stays_a_mean(dropped, expected):
    factors = smallest(torch.tensor([3.0, 9.0, 1.0, 7.0, 2.0]), dropped)
    torch.testing.assert_close(factors, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize(
    ("epoch", "ramp", "expected"), [(0, 10, 0.0), (5, 10, 0.2), (10, 10, 0.4), (25, 10, 0.4), (0, 0, 0.4)]
)
def test_the_dropped_share_grows_linearly(epoch, ramp, expected):
    loss = make_loss(epoch=epoch, loss="small_loss", trim=0.4, trim_epochs=ramp)
    assert loss.dropped() == pytest.approx(expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_cross_entropy_is_torchs(batch, smoothing):
    logits, labels = batch
    found = call(make_loss(smoothing), logits, labels)
    torch.testing.assert_close(found, F.cross_entropy(logits, labels, label_smoothing=smoothing))


@pytest.mark.parametrize("options", [{}, {"loss": "gce"}])
def test_micro_batches_add_up_to_the_batch(batch, options):
    logits, labels = batch
    loss = make_loss(**options)
    parts = [call(loss, logits[i : i + 2], labels[i : i + 2], items=6) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts), call(loss, logits, labels))


def test_small_losses_are_averaged_over_what_is_kept(batch):
    logits, labels = batch
    loss = make_loss(loss="small_loss", trim=0.5, trim_epochs=0)
    plain = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(call(loss, logits, labels), plain.sort().values[:3].mean())
    # In micro-batches each drops its own.
    kept = torch.cat([part.sort().values[:1] for part in plain.split(2)])
    parts = [call(loss, logits[i : i + 2], labels[i : i + 2], items=6) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts), kept.mean())


def test_outliers_are_multiplied_and_not_recorded_so(batch):
    logits, labels = batch
    loss = make_loss(outliers=1, outlier_scale=100)
    plain = F.cross_entropy(logits, labels, reduction="none").detach()
    torch.manual_seed(1)
    found = {round(float(call(loss, logits, labels).detach() * 6), 6) for _ in range(60)}
    assert found == {round(float(plain.sum() + 99 * one), 6) for one in plain}
    torch.testing.assert_close(loss.record.means(), plain)
    assert loss.record.batches == pytest.approx([plain.mean().item()] * 60)


@pytest.mark.parametrize("options", [{"loss": "gce"}, {"loss": "small_loss"}, {"outliers": 2}, {"loss_bound": 0.5}])
def test_evaluation_measures_cross_entropy_and_records_nothing(batch, options):
    logits, labels = batch
    loss = make_loss(smoothing=0.1, epoch=99, **options)
    with torch.no_grad():
        torch.testing.assert_close(loss({"logits": logits}, labels), F.cross_entropy(logits, labels))
    assert loss.record.counts.sum() == 0


def test_a_batch_without_index_is_told(batch):
    logits, labels = batch
    loss = make_loss()
    call(loss, logits, labels)
    with pytest.raises(ValueError, match="no index column"):  # an index counts for one batch
        loss({"logits": logits}, labels)


def test_record_averages_over_the_times_that_a_sample_was_seen():
    record = LossRecord(4)
    record.add(torch.tensor([2, 0]), torch.tensor([1.0, 5.0]))
    record.add(torch.tensor([2, 1]), torch.tensor([3.0, 7.0]))
    assert record.means()[:3].tolist() == [5.0, 7.0, 2.0]
    assert record.means()[3].isnan()
    assert record.batches == [3.0, 5.0]
    resumed = LossRecord(4)
    resumed.load_state_dict(record.state_dict())
    torch.testing.assert_close(resumed.means(), record.means(), equal_nan=True)
    assert resumed.batches == record.batches
    with pytest.raises(ValueError, match="4 training samples, this run has 5"):
        LossRecord(5).load_state_dict(record.state_dict())


@pytest.mark.parametrize(
    ("batches", "expected"),
    [([1.0, 2.0], None), ([1.0, 1.0, 9.0, 2.0, 1.0], 9.0), ([4.0, 2.0, 1.0], 1 / 3), ([1.0, 1.0, math.inf], math.inf)],
)
def test_largest_rise_is_over_the_median_of_the_steps_before(batches, expected):
    assert largest_rise(batches, window=2) == (expected if expected is None else pytest.approx(expected))
