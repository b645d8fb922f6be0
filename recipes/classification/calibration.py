"""How far a classifier's confidence is from its accuracy."""

from __future__ import annotations

import numpy as np
from transformers import EvalPrediction

from common.trainer import accuracy, logits_of

BINS = 15


def calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the expected calibration error over 15 bins (Guo et al. 2017, arXiv 1706.04599, Eq. 3).

    The confidence of a row is the largest of its probabilities. Bin m of M has the rows whose confidence is in
    `((m - 1) / M, m / M]`. The error is the mean over the rows of |accuracy - mean confidence| of their bins.

    Args:
        logits: `[n, C]`.
        labels: `[n]`.

    Returns:
        The error, in [0, 1]; NaN where a logit is not finite.
    """
    if not np.isfinite(logits).all():
        return float("nan")
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    confidence = 1 / np.exp(shifted).sum(axis=1)  # that of the largest logit, which is shifted to 0
    bins = np.minimum(np.ceil(confidence * BINS).astype(int), BINS)
    gaps = (logits.argmax(axis=1) == labels) - confidence
    return float(np.abs(np.bincount(bins, weights=gaps)).sum() / len(labels))


def accuracy_and_calibration(prediction: EvalPrediction) -> dict[str, float]:
    """Return both, for Trainer's `compute_metrics`."""
    return accuracy(prediction) | {"calibration_error": calibration_error(logits_of(prediction), prediction.label_ids)}
