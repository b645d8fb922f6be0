"""Outsized losses, and the bound against them."""

from __future__ import annotations

import pytest
import torch

from common.outliers import OutlierArguments, bound
from common.trainer import make_loss


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


def test_a_bound_is_above_0() -> None:
    with pytest.raises(ValueError, match=r"loss_bound is 0; it must be above 0\."):
        OutlierArguments(loss_bound=0)


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
