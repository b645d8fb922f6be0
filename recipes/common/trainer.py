"""What the recipes on text train with: a Trainer with their samplers and a true model card, collator, loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Sampler, SequentialSampler

from common.evaluation import WholeEvaluation
from common.outliers import OutlierArguments
from common.sampler import ShuffledLengthGroups
from common.timer import TimedTrainer

LENGTH = "length"


class TextTrainer(WholeEvaluation, TimedTrainer):
    """A Trainer for rows with a column `length`, of which those to evaluate on are sorted already.

    Args:
        optimizer_cls_and_kwargs: As Trainer's, which its subclasses do not all pass on.
        render_card: Returns the text of README.md. Trainer's own card states the optimizer of `--optim`,
            whatever the optimizer was, and is written again at every push to the Hub.
        **kwargs: Trainer's.
    """

    def __init__(
        self,
        *,
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None,
        render_card: Callable[[], str],
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        self.render_card = render_card

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return ShuffledLengthGroups(dataset[LENGTH], step, seed)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> SequentialSampler:
        # Trainer shuffles the evaluation too where training batches are grouped by length, and so loses track
        # of which prediction belongs to which row.
        return SequentialSampler(eval_dataset)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write README.md, by `render_card` alone."""
        if self.is_world_process_zero():
            Path(self.args.output_dir, "README.md").write_text(self.render_card(), encoding="utf-8")

    @contextmanager
    def weights_of(self, checkpoint: str) -> Iterator[None]:
        """Give the model the weights of a checkpoint for a while."""
        last = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(type(self.model).from_pretrained(checkpoint).state_dict())
        try:
            yield
        finally:
            self.model.load_state_dict(last)


def drop_length(pad: Callable[[list[dict[str, Any]]], Mapping[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Return a collator that drops `length` and keeps every other column.

    Trainer cannot drop it: it would drop the index column of FNGD's `sharing="index"` too.

    Args:
        pad: The collator that pads the rows of a batch.
    """

    def collate(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        return dict(pad([{key: row[key] for key in row if key != LENGTH} for row in features]))

    return collate


def make_loss(label_smoothing: float, outliers: OutlierArguments | None = None) -> Callable[..., Tensor]:
    """Return the label-smoothed cross entropy for Trainer's `compute_loss_func`.

    It is the mean over the labels of the whole batch (target tokens, or rows to classify), over all micro-batches
    and processes. The model's own loss is not: Marian, or BERT's classifier, ignores `num_items_in_batch`, so that
    Trainer would make its gradient larger by the number of accumulation steps. With smoothing it equals Trainer's
    LabelSmoother, in less time and memory.

    Args:
        label_smoothing: The share of the target that is spread over all labels.
        outliers: What is done to the losses of a training batch's samples.
    """

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits = outputs["logits"] if outliers is None else outliers.clipped(outputs["logits"])
        losses = partial(F.cross_entropy, logits.flatten(0, -2), labels.flatten(), label_smoothing=label_smoothing)
        if outliers is not None and outliers.of_samples and torch.is_grad_enabled():
            total = outliers.distort(losses(reduction="none").view(len(labels), -1).sum(1)).sum()
        else:
            total = losses(reduction="sum")
        return total / (labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)

    return loss
