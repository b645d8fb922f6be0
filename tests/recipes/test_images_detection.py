"""How well scores find wrong labels, and what a run comes to."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from hf_fngd import FNGD
from images.detection import detection, precision_at, rank_auc, weight_scores
from images.summary import best_epochs, memorized
from tests.nets import *  # noqa: F403


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
    assert rank_auc(torch.tensor(scores, dtype=torch.float32), torch.tensor(wrong).bool()) == auc
