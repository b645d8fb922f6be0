"""How well a score finds the samples whose labels are wrong; the higher the score, the more suspicious the sample."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fngd import FNGD
from hf_fngd.sharing import IndexSharing


def rank_auc(scores: Tensor, wrong: Tensor) -> float | None:
    """Return the probability that a wrong sample scores above a right one, ties counting half.

    Args:
        scores: `[n]`.
        wrong: Which samples are wrong, `[n]`.

    Returns:
        The area under the ROC curve; None where either kind is missing.
    """
    _, place, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    counts = counts.double()
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[place]  # of equal scores the mean
    positive, negative = int(wrong.sum()), int((~wrong).sum())
    if not positive or not negative:
        return None
    return (float(ranks[wrong].sum()) - positive * (positive + 1) / 2) / (positive * negative)


def precision_at(k: int, scores: Tensor, wrong: Tensor) -> float | None:
    """Return the share of wrong samples among the `k` highest scores, ties at the edge in random order on average.

    Returns:
        The share; None where k is 0.
    """
    if k == 0:
        return None
    edge = scores.topk(k).values[-1]
    above, tied = scores > edge, scores == edge
    free = k - int(above.sum())
    found = float(wrong[above].sum()) + free * float(wrong[tied].sum()) / float(tied.sum())
    return found / k


def detection(name: str, scores: Tensor, wrong: Tensor) -> dict[str, float | None]:
    """Return both figures of a score, k being the number of wrong samples; samples whose score is NaN are left out."""
    known = ~scores.isnan()
    scores, wrong = scores[known], wrong[known]
    return {
        f"{name}_auc": rank_auc(scores, wrong),
        f"{name}_precision": precision_at(int(wrong.sum()), scores, wrong),
    }


def weight_scores(optimizer: torch.optim.Optimizer, samples: int) -> dict[str, Tensor]:
    """Return the scores that FNGD's weights give the training samples, by name: the lower a weight, the higher.

    Args:
        optimizer: The optimizer that trained, in accelerate's wrapper or not.
        samples: Rows of the training set.

    Returns:
        `weight`, from the mean of the weights over layers and coefficient steps, NaN where there were none; nothing
        where the optimizer followed no samples.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(optimizer, FNGD) or not isinstance(optimizer.preconditioner.policy, IndexSharing):
        return {}
    suspects = optimizer.suspects()
    scores = torch.full((samples,), torch.nan)
    scores[suspects.index] = -suspects.weight
    return {"weight": scores}
