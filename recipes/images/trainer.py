"""The Trainer of the recipe: it tells the loss which samples a batch holds, and saves their losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalPrediction

from common.evaluation import WholeEvaluation
from common.timer import TimedTrainer
from hf_fngd.sharing import INDEX_COLUMN
from images.data import as_it_is
from images.losses import TrainingLoss
from images.record import LossRecord

LOSSES_NAME = "sample_losses.pt"


class ImageTrainer(WholeEvaluation, TimedTrainer):
    """A Trainer for `images.data.Columns`.

    Args:
        record: Filled by the loss, written into each checkpoint and the output folder.
        keeps_index: Whether the optimizer takes the index column out of the model's inputs, as FNGD does.
        **kwargs: Trainer's; `compute_loss_func` is a `TrainingLoss`.
    """

    def __init__(self, *, record: LossRecord, keeps_index: bool, **kwargs: Any) -> None:
        super().__init__(data_collator=as_it_is, compute_metrics=accuracy, **kwargs)
        self.record = record
        self.keeps_index = keeps_index

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Take note of the samples, then do what Trainer does."""
        if isinstance(self.compute_loss_func, TrainingLoss):
            self.compute_loss_func.index = inputs.get(INDEX_COLUMN) if model.training else None
        if not self.keeps_index:
            inputs = {name: value for name, value in inputs.items() if name != INDEX_COLUMN}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the losses beside the model: ahead of trainer_state.json, with which a checkpoint is complete."""
        super().save_model(output_dir, _internal_call)
        state = self.whole_record().state_dict()
        if self.args.should_save:
            torch.save(state, Path(output_dir or self.args.output_dir, LOSSES_NAME))

    def whole_record(self) -> LossRecord:
        """Return the record of all processes; the losses of batches are those of this one."""
        whole = LossRecord(len(self.record.sums))
        whole.sums, whole.counts = (
            self.accelerator.reduce(tensor.to(self.args.device)).cpu()
            for tensor in (self.record.sums, self.record.counts)
        )
        whole.batches = self.record.batches
        return whole

    def load_record(self, checkpoint: str) -> None:
        """Read the losses of a checkpoint, of all processes, into the first one's record."""
        if self.is_world_process_zero():
            self.record.load_state_dict(torch.load(Path(checkpoint, LOSSES_NAME), weights_only=True))


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of right answers, for Trainer's `compute_metrics`."""
    return {"accuracy": float((prediction.predictions.argmax(axis=1) == prediction.label_ids).mean())}


def predicted(
    trainer: ImageTrainer, split: torch.utils.data.Dataset[Any], prefix: str
) -> tuple[Tensor, dict[str, float]]:
    """Return the logits `[n, C]` of a split, and its loss and accuracy with the prefix before their names."""
    output = trainer.predict(split, metric_key_prefix=prefix)
    metrics = {key: output.metrics[key] for key in (f"{prefix}_loss", f"{prefix}_accuracy")}
    return torch.from_numpy(output.predictions), metrics
