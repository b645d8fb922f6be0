"""The Trainer of the recipe: translations in a known order, scored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, Seq2SeqTrainer
from transformers.trainer_utils import EvalPrediction

from common.trainer import TextTrainer
from translation.data import HeldOut
from translation.metric import SacreBleu


class TranslationTrainer(TextTrainer, Seq2SeqTrainer):
    """A Seq2SeqTrainer for `HeldOut` splits."""

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
        with self.weights_of(checkpoint):
            return self.translate(held_out, prefix)


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
