"""What fine-tuning does to what a pretrained model knew of other texts: how far their embeddings move, and a probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import DatasetDict
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.arguments import at_least_one, option

EMBEDDED = "subjects"
_BATCH, _RIDGE = 64, 1e-3


@dataclass
class ForgettingArguments:
    """The texts and labels of another task, which nothing is trained on."""

    forgetting_dataset: str | None = option(
        None,
        f"Measure forgetting on another task: Hub id or local folder with splits train and test, or '{EMBEDDED}', "
        "sentences of the recipe's own.",
    )
    forgetting_text_column: str = option("text", "Forgetting: column of the texts.")
    forgetting_label_column: str = option("label", "Forgetting: column of the labels.")
    forgetting_samples: int = option(1000, "Forgetting: texts of each of the two splits, drawn at random.")

    def __post_init__(self) -> None:
        """Reject values that no run can use."""
        at_least_one(self, "forgetting_samples")


class Forgetting:
    """Embeddings before training, to be compared with those after it.

    Args:
        model: The model before training, and afterwards; a classifier, or one in PEFT's wrapper.
        tokenizer: Its tokenizer.
        splits: train and test, with the columns text and labels.
        samples: How many rows of each, drawn with a seed of their own.
        max_length: Longer texts are cut to so many tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        splits: DatasetDict,
        samples: int,
        max_length: int,
    ) -> None:
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length
        drawn = [splits[name].shuffle(seed=0) for name in ("train", "test")]
        self.splits = [rows.select(range(min(samples, len(rows)))) for rows in drawn]
        self.labels = [torch.tensor(rows["labels"]) for rows in self.splits]
        self.before = self._embed()

    def measure(self) -> dict[str, float]:
        """Return the test texts' mean cosine similarity with before, and the probe's test accuracy before and after."""
        after = self._embed()
        return {
            "forgetting_cosine": float(F.cosine_similarity(self.before[1], after[1]).mean()),
            "forgetting_probe_before": self._probe(self.before),
            "forgetting_probe_after": self._probe(after),
        }

    def _embed(self) -> list[Tensor]:
        return [embed(self.model, self.tokenizer, list(rows["text"]), self.max_length) for rows in self.splits]

    def _probe(self, embeddings: Sequence[Tensor]) -> float:
        (train, test), (train_labels, test_labels) = embeddings, self.labels
        return probe_accuracy(train, train_labels, test, test_labels)


@torch.no_grad()
def embed(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int
) -> Tensor:
    """Return the means `[n, d]`, in float64 on the CPU, of the encoder's last hidden states over a text's tokens."""
    whole: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    device, training, rows = next(model.parameters()).device, model.training, []
    model.eval()
    for start in range(0, len(texts), _BATCH):
        part = list(texts[start : start + _BATCH])
        batch = tokenizer(part, truncation=True, max_length=max_length, padding=True, return_tensors="pt").to(device)
        hidden = whole.base_model(**batch).last_hidden_state.double()
        mask = batch["attention_mask"].unsqueeze(-1)
        rows.append(((hidden * mask).sum(1) / mask.sum(1).clamp(min=1)).cpu())
    model.train(training)
    return torch.cat(rows)


def probe_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Return the test accuracy of a linear classifier: ridge regression on one-hot targets, with an intercept.

    Args:
        train: Embeddings `[n, d]`.
        train_labels: Classes `[n]`, from 0 on.
        test: Embeddings `[m, d]`.
        test_labels: Classes `[m]`.

    Returns:
        The accuracy; NaN where an embedding is not finite. The ridge is 0.001 of the mean eigenvalue of the
        embeddings' second moments, so that their scale does not count.
    """
    if not (train.isfinite().all() and test.isfinite().all()):
        return float("nan")
    targets = F.one_hot(train_labels).to(train)
    mean, centred = train.mean(0), train - train.mean(0)
    moments = centred.T @ centred
    moments.diagonal().add_(_RIDGE * moments.diagonal().mean() + torch.finfo(moments.dtype).tiny)
    weight = torch.linalg.solve(moments, centred.T @ (targets - targets.mean(0)))
    scores = (test - mean) @ weight + targets.mean(0)
    return float((scores.argmax(1) == test_labels).double().mean())
