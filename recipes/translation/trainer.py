"""The Trainer of the recipe: translations, scored, and in the order of their split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, Seq2SeqTrainer
from transformers.trainer_utils import EvalPrediction

from common.data import first
from text.trainer import TextTrainer, mean_nll
from translation.data import TARGET
from translation.metric import SacreBleu

ROW = "row"  # a pair's place in its split
# The scores, and whether they are lowercased.
BLEUS = {"bleu": False, "bleu_lc": True}


class TranslationTrainer(TextTrainer, Seq2SeqTrainer):
    """A Seq2SeqTrainer for tokenized pairs that keep their texts and their places."""

    def score(self, rows: Dataset, prefix: str) -> dict[str, Any]:
        """Translate pairs and score them.

        Returns:
            The loss, the speed, both BLEU and their parts, and nll, the mean negative log-likelihood of a target token.
            With the prefix "eval" train_nll too, the same of as many pairs from the start of the training split; with
            "predict" the translations are written to predictions.txt, with "predict_NAME" to predictions_NAME.txt.
        """
        each_epoch, of_validation = self.args.predict_with_generate, self.compute_metrics
        self.args.predict_with_generate, self.compute_metrics = True, None  # that of mid-training knows one split
        try:
            output = self.predict(rows, metric_key_prefix=prefix)
        finally:
            self.args.predict_with_generate, self.compute_metrics = each_epoch, of_validation
        # Several processes pad the last round of batches with sentences from the start.
        translations = decode(self.processing_class, output.predictions[: len(rows)])
        metrics = output.metrics
        for name, lowercase in BLEUS.items():
            bleu = SacreBleu(lowercase).compute(predictions=translations, references=list(rows[TARGET]))
            metrics |= {f"{prefix}_{name}": bleu.pop("score")}
            metrics |= {f"{prefix}_{name}_{part}": value for part, value in bleu.items()}
        metrics[f"{prefix}_nll"] = mean_nll(self.log_likelihoods(rows))
        if prefix == "eval":
            metrics["train_nll"] = mean_nll(self.log_likelihoods(first(self.train_dataset, len(rows))))
        if prefix.startswith("predict") and self.is_world_process_zero():
            ordered = [text for _, text in sorted(zip(rows[ROW], translations, strict=True))]
            file = Path(self.args.output_dir, f"predictions{prefix.removeprefix('predict')}.txt")
            file.write_text("\n".join(ordered) + "\n", encoding="utf-8")
        return metrics

    @torch.no_grad()
    def log_likelihoods(self, rows: Dataset) -> Tensor:
        """Score the targets of tokenized pairs, without dropout and label smoothing.

        Returns:
            `[n, 2]`, a row a pair: the negative log-likelihood of its target in nats, and the tokens of its target.
        """
        self.model.eval()
        scores = []
        for batch in self.get_eval_dataloader(rows):
            inputs = self._prepare_inputs(batch)
            labels = inputs.pop("labels")
            logits = self.model(**inputs)["logits"]
            losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").view_as(labels)
            scored = torch.stack([losses.sum(1), labels.ne(-100).sum(1)], dim=1)
            scores.append(self.accelerator.gather_for_metrics(scored).cpu())
        return torch.cat(scores)


def make_bleu(
    tokenizer: PreTrainedTokenizerBase, references: Sequence[str]
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return `compute_metrics` for an evaluation with generation in mid-training: BLEU against whole references."""

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        translations = decode(tokenizer, prediction.predictions[: len(references)])
        return {"bleu": SacreBleu().compute(predictions=translations, references=references)["score"]}

    return compute


def decode(tokenizer: PreTrainedTokenizerBase, rows: np.ndarray) -> list[str]:
    """Turn rows of token ids, padded with -100 where batches were joined, into texts."""
    rows = np.where(rows == -100, tokenizer.pad_token_id, rows)
    return tokenizer.batch_decode(rows, skip_special_tokens=True)
