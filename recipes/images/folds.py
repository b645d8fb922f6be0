"""Predictions for training samples by models that have not seen them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import TrainingArguments

from images.data import Columns
from images.trainer import ImageTrainer, predicted


def out_of_sample_logits(train: Columns, folds: int, make_trainer: Callable[[Columns], ImageTrainer]) -> Tensor:
    """Train a model without each of the parts of the training set, and let it predict that part.

    Args:
        train: The training set; every `folds`-th row belongs to the same part.
        folds: Number of parts, at least 2.
        make_trainer: Takes a part of the training set, returns a Trainer of a new model for it.

    Returns:
        Logits `[n, C]`.
    """
    part = torch.arange(len(train)) % folds
    logits = []
    for fold in range(folds):
        trainer = make_trainer(train.where(part != fold))
        trainer.train()
        logits.append(predicted(trainer, train.where(part == fold), "fold")[0])
    order = torch.cat([torch.nonzero(part == fold).squeeze(1) for fold in range(folds)])
    return torch.cat(logits)[order.argsort()]


def without_traces(args: TrainingArguments) -> TrainingArguments:
    """Return the arguments of a training that saves and evaluates nothing."""
    args = copy.copy(args)
    args.save_strategy = args.eval_strategy = "no"
    return args
