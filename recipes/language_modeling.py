"""Train a GPT-2 from scratch on single sentences, and measure its perplexity.

    accelerate launch recipes/language_modeling.py --output_dir outputs/language_modeling
    accelerate launch recipes/language_modeling.py --dataset_name bentrevett/multi30k --optimizer adamw

Every sentence is a row of its own, padded to the longest of its batch, and so a sample. Loss and perplexity are those
of a token, over all tokens of the split. The output folder holds the model and its tokenizer, README.md and
all_results.json. A run that was interrupted resumes from its last checkpoint when it is started again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    DataCollatorForSeq2Seq,
    EvalPrediction,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
)

import corpus
from common.arguments import OptimizerArguments, TextTrainingArguments, at_least_one, check_model_size, option, parse
from common.data import shown
from common.run import prepare
from text.arguments import TextArguments
from text.data import TEXT, encode, load_splits
from text.run import train_and_score
from text.tokenizer import EOS, load_or_train
from text.trainer import mean_nll


@dataclass
class ModelArguments:
    """Size of the GPT-2."""

    n_embd: int = option(128, "Width of embeddings and hidden states.")
    n_layer: int = option(4, "Layers.")
    n_head: int = option(4, "Attention heads; they divide n_embd.")
    n_positions: int = option(128, "Longer sentences are cut to so many tokens.")
    dropout: float = option(0.1, "Dropout on embeddings, attention weights and each sublayer's output.")
    vocab_size: int = option(8000, "Size of the vocabulary, an upper bound.")
    tie_word_embeddings: bool = option(True, "Whether the output head and the embedding share one matrix.")

    def __post_init__(self) -> None:
        """Reject sizes that do not fit together."""
        at_least_one(self, "n_embd", "n_layer", "n_head")
        if self.n_positions < 2:
            raise ValueError(f"n_positions is {self.n_positions}; a token and the next one take at least 2.")
        check_model_size(self, "n_head", "n_embd")


DATACLASSES = (TextArguments, ModelArguments, OptimizerArguments, TextTrainingArguments)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Reduce logits to what a perplexity needs, for `preprocess_logits_for_metrics`.

    Args:
        logits: `[N, T, V]`.
        labels: `[N, T]` or longer, where several processes padded them to the same length; -100 counts not.

    Returns:
        `[N, 2]`: of each sentence the sum of the losses of its tokens but the first, and their number.
    """
    targets = labels[:, 1 : logits.shape[1]]
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), targets, reduction="none")
    return torch.stack([losses.sum(1), targets.ne(-100).sum(1)], dim=1)


def perplexity(prediction: EvalPrediction) -> dict[str, float]:
    """Return the perplexity, from what `token_losses` left of each sentence."""
    return {"perplexity": float(torch.tensor(mean_nll(prediction.predictions), dtype=torch.float64).exp())}


def loss_and_perplexity(prediction: EvalPrediction) -> dict[str, float]:
    """Return what Trainer's `compute_metrics` does; its own loss, which this one replaces, weighs batches by rows."""
    return {"loss": mean_nll(prediction.predictions)} | perplexity(prediction)


def build_model(tokenizer: PreTrainedTokenizerBase, arguments: ModelArguments) -> GPT2LMHeadModel:
    """Build a GPT-2 with transformers' own initialization, from torch's global generator."""
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=arguments.n_embd,
            n_layer=arguments.n_layer,
            n_head=arguments.n_head,
            n_positions=arguments.n_positions,
            tie_word_embeddings=arguments.tie_word_embeddings,
            resid_pdrop=arguments.dropout,
            embd_pdrop=arguments.dropout,
            attn_pdrop=arguments.dropout,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # GPT2LMHeadModel's name tells transformers nothing of its loss, so that Trainer would count the first token of each
    # sentence, which nobody predicts, among those that the loss is a mean of.
    model.loss_type = "ForCausalLM"
    return model


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, evaluate, write the output folder, and return what all_results.json holds."""
    defaults = {"output_dir": "outputs/language_modeling", "text_column": "en"}
    parsed = parse(DATACLASSES, argv, **defaults)
    data_args, model_args, _, args = parsed
    run = prepare(parsed)
    with args.main_process_first(desc="loading the dataset"):  # the other processes find the download
        texts = load_splits(data_args, corpus.load)
    # A sentence starts and ends with </s>, so that its first word is predicted too. The tokenizer sets the first
    # alone: a text to go on with has no end.
    tokenizer = load_or_train(run.checkpoint, texts["train"][TEXT], model_args.vocab_size, f"{EOS} $A")

    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        whole = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(batch[TEXT])["input_ids"]]
        rows = [ids[: model_args.n_positions] for ids in whole]
        return {"input_ids": rows, "labels": rows}

    splits = encode(texts, tokenize, data_args.preprocessing_num_workers)
    run.seed()
    facts = {"recipe": "language_modeling.py", "task": "text-generation", "dataset_name": shown(data_args.dataset_name)}
    return train_and_score(
        run,
        build_model(tokenizer, model_args),
        tokenizer,
        splits,
        facts | {"text_column": data_args.text_column},
        data_collator=DataCollatorForSeq2Seq(tokenizer),  # labels are padded with -100
        compute_metrics=loss_and_perplexity,
        preprocess_logits_for_metrics=token_losses,
    )


if __name__ == "__main__":
    main()
