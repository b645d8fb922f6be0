"""What the recipes on texts train with: a Trainer with their samplers and scores, and a true model card."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import TrainOutput

from common.trainer import RecipeTrainer
from hf_fngd.trainer.checkpoints import complete_checkpoints
from text.data import LENGTH
from text.sampler import ShuffledLengthGroups

logger = logging.getLogger(__name__)
FIRST = "first_predict"
"""Prefix of the test scores after one epoch."""


class TextTrainer(RecipeTrainer):
    """A Trainer for rows with a column `length`, of which those to evaluate on are sorted already.

    Args:
        optimizer_cls_and_kwargs: As Trainer's, which its subclasses do not all pass on.
        **kwargs: `RecipeTrainer`'s.
    """

    def __init__(self, *, optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        self.averaged = 0  # checkpoints
        if self.args.average_checkpoints > 1 and self.is_fsdp_enabled:
            raise ValueError(
                "average_checkpoints does not work under FSDP, whose checkpoints hold parts of the weights."
            )

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as the Trainer does; the model then is the mean of the checkpoints that the arguments ask for."""
        output = super().train(*args, **kwargs)
        if self.args.average_checkpoints > 1:
            self.averaged = self.average(self.args.average_checkpoints)
        return output

    def average(self, number: int) -> int:
        """Give the model the mean of the weights of its last complete checkpoints, of so many; return how many."""
        folders = list(itertools.islice(complete_checkpoints(self.args.output_dir), number))
        if self.accelerator.num_processes > 1:  # of which each may have another disk
            folders = broadcast_object_list([folders])[0]
        if len(folders) < number:
            logger.warning("%d checkpoints are there to be averaged, of %d", len(folders), number)
        sums: dict[str, Tensor] = {}
        for folder in folders:
            for name, tensor in self._read(folder).items():
                sums[name] = sums[name] + tensor if name in sums else tensor.double()
        if sums:
            self._load({name: total / len(folders) for name, total in sums.items()})
        return len(folders)

    def score(self, rows: Dataset, prefix: str) -> dict[str, Any]:
        """Return what is measured on tokenized rows, with the prefix and an underscore before each name."""
        return self.predict(rows, metric_key_prefix=prefix).metrics

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        # Trainer has taken `length` out of the dataset that it hands over: the model has no use for it.
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(self.train_dataset)
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return ShuffledLengthGroups(self.train_dataset[LENGTH], step, self.args.seed_of_data)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> SequentialSampler:
        # Trainer shuffles the evaluation too where training batches are grouped by length, and so loses track
        # of which prediction belongs to which row.
        return SequentialSampler(eval_dataset)

    @contextmanager
    def weights_of(self, checkpoint: str) -> Iterator[None]:
        """Give the model the weights of a checkpoint for a while."""
        last = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self._load(self._read(checkpoint))
        try:
            yield
        finally:
            self.model.load_state_dict(last)

    def _read(self, checkpoint: str | Path) -> dict[str, Tensor]:
        """Return the weights that a checkpoint holds, of an adapted model those of the adapters."""
        if isinstance(self.model, PeftModel):
            return load_peft_weights(str(checkpoint), device="cpu")
        return type(self.model).from_pretrained(checkpoint).state_dict()

    def _load(self, weights: dict[str, Tensor]) -> None:
        if isinstance(self.model, PeftModel):
            set_peft_model_state_dict(self.model, weights)
        else:
            self.model.load_state_dict(weights)


class FirstEpoch(TrainerCallback):
    """Scores rows after one epoch, and logs it: what a checkpoint keeps outlives an interruption."""

    def __init__(self, trainer: TextTrainer, rows: Dataset) -> None:
        self.trainer, self.rows = trainer, rows

    def on_epoch_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Score."""
        if state.epoch is not None and math.isclose(state.epoch, 1, abs_tol=1e-6):
            self.trainer.log(self.trainer.score(self.rows, FIRST))


def mean_nll(scores: np.ndarray | Tensor) -> float:
    """Return the mean loss of a token, from `[n, 2]`: of each text the sum of its tokens' losses, and their number."""
    loss, tokens = np.asarray(scores, dtype=np.float64).sum(axis=0)
    return float(loss / tokens)
