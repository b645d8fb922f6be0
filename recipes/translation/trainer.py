"""The Trainer of the recipe: shuffled batches, translations in a known order, a right loss, a true card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedTokenizerBase, Seq2SeqTrainer
from transformers.trainer_utils import EvalPrediction

from common.timer import TimedTrainer
from translation.data import LENGTH, HeldOut
from translation.metric import SacreBleu
from translation.sampler import ShuffledLengthGroups


class TranslationTrainer(TimedTrainer, Seq2SeqTrainer):
    """A Seq2SeqTrainer for `HeldOut` splits.

    Args:
        optimizer_cls_and_kwargs: As Trainer's, which Seq2SeqTrainer does not pass on.
        render_card: Returns the text of README.md. Trainer's own card states the optimizer of `--optim`,
            whatever the optimizer was, and is written again at every push to the Hub.
        **kwargs: Seq2SeqTrainer's.
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
        # of which translation belongs to which sentence. HeldOut is sorted already.
        return SequentialSampler(eval_dataset)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write README.md, by `render_card` alone."""
        if self.is_world_process_zero():
            Path(self.args.output_dir, "README.md").write_text(self.render_card(), encoding="utf-8")

    def translate(self, held_out: HeldOut, prefix: str) -> tuple[list[str], dict[str, Any]]:
        """Translate a split and score it.

        Args:
            held_out: The split.
            prefix: Goes before each metric's name, with an underscore.

        Returns:
            The translations in the order of the split; the loss, the speed, BLEU and its parts.
        """
        each_epoch = self.args.predict_with_generate
        self.args.predict_with_generate = True
        try:
            output = self.predict(held_out.encoded, metric_key_prefix=prefix)
        finally:
            self.args.predict_with_generate = each_epoch
        # Several processes pad the last round of batches with sentences from the start.
        rows = output.predictions[: len(held_out.order)]
        translations = held_out.restore(decode(self.processing_class, rows))
        bleu = SacreBleu().compute(predictions=translations, references=held_out.references)
        bleu["bleu"] = bleu.pop("score")
        metrics = dict(output.metrics)
        for name, value in bleu.items():
            metrics[f"{prefix}_{name if name == 'bleu' else 'bleu_' + name}"] = value
        return translations, metrics

    @torch.no_grad()
    def log_likelihoods(self, encoded: Dataset) -> Tensor:
        """Score the targets of tokenized pairs, without dropout and label smoothing.

        Returns:
            `[n, 2]`, a row a pair: the negative log-likelihood of its target in nats, and the tokens of its target.
        """
        self.model.eval()
        rows = []
        for batch in self.get_eval_dataloader(encoded):
            inputs = self._prepare_inputs(batch)
            labels = inputs.pop("labels")
            logits = self.model(**inputs)["logits"]
            losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").view_as(labels)
            scored = torch.stack([losses.sum(1), labels.ne(-100).sum(1)], dim=1)
            rows.append(self.accelerator.gather_for_metrics(scored).cpu())
        return torch.cat(rows).double()

    def translate_as_of(self, checkpoint: str, held_out: HeldOut, prefix: str) -> tuple[list[str], dict[str, Any]]:
        """Do what `translate` does with the weights of a checkpoint, and keep the model's own."""
        last = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(type(self.model).from_pretrained(checkpoint).state_dict())
        try:
            return self.translate(held_out, prefix)
        finally:
            self.model.load_state_dict(last)


def make_loss(label_smoothing: float) -> Callable[..., Tensor]:
    """Return the label-smoothed cross entropy for Trainer's `compute_loss_func`.

    It is the mean over the target tokens of the whole batch, over all micro-batches and processes. The model's
    own loss is not: Marian ignores `num_items_in_batch`, so that Trainer would make its gradient larger by the
    number of accumulation steps. With smoothing it equals Trainer's LabelSmoother, in less time and memory.
    """

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits = outputs["logits"]
        total = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=label_smoothing
        )
        return total / (labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)

    return loss


def mean_nll(scores: Tensor) -> float | None:
    """Return the mean negative log-likelihood of a token from `log_likelihoods`' rows; None where there are none."""
    loss, tokens = scores.sum(0).tolist()
    return loss / tokens if tokens else None


def make_bleu(tokenizer: PreTrainedTokenizerBase, size: int) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return `compute_metrics` for an evaluation with generation in mid-training: BLEU of `size` pairs."""

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        translations = decode(tokenizer, prediction.predictions[:size])
        references = decode(tokenizer, prediction.label_ids[:size])
        return {"bleu": SacreBleu().compute(predictions=translations, references=references)["score"]}

    return compute


def decode(tokenizer: PreTrainedTokenizerBase, rows: np.ndarray) -> list[str]:
    """Turn rows of token ids, padded with -100 where batches were joined, into texts."""
    rows = np.where(rows == -100, tokenizer.pad_token_id, rows)
    return tokenizer.batch_decode(rows, skip_special_tokens=True)
