"""Fine-tune a classifier of texts, or train a small one from scratch, and measure its accuracy.

    accelerate launch recipes/text_classification.py --output_dir outputs/text_classification
    accelerate launch recipes/text_classification.py --model_name_or_path google-bert/bert-base-uncased
        --dataset_name fancyzhx/ag_news --train_split 'train[:95%]' --validation_split 'train[95%:]'

The output folder holds the model and its tokenizer, README.md, all_results.json and learning_curve.png. A run that was
interrupted resumes from its last checkpoint when it is started again. With `--metric_for_best_model accuracy` and
`--save_total_limit 2` the test split is also scored with the weights of the best epoch, as best_predict_accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from common.arguments import OptimizerArguments, TextTrainingArguments, at_least_one, check_model_size, option, parse
from common.loss import make_loss
from common.run import prepare
from common.trainer import accuracy
from text import subjects
from text.arguments import TextArguments
from text.data import TEXT, encode, load_splits
from text.run import train_and_score
from text.tokenizer import EOS, load_or_train

LABEL, LABELS = "label", "labels"  # of the dataset, and of the model


@dataclass
class DataArguments(TextArguments):
    """Which texts with which labels, and how many of them."""

    label_column: str = option("label", "Column of the labels: class labels, whole numbers or strings.")
    max_length: int = option(128, "Longer texts are cut to so many tokens.")

    def __post_init__(self) -> None:
        """Reject values that no run can use."""
        super().__post_init__()
        at_least_one(self, "max_length")


@dataclass
class ModelArguments:
    """A model to fine-tune, or the size of a BERT to train from scratch."""

    model_name_or_path: str | None = option(
        None, "Hub id or local folder of a model and its tokenizer. Default: a new BERT of the sizes below."
    )
    hidden_size: int = option(128, "New model: width of embeddings and hidden states; feed-forward layers have four.")
    num_hidden_layers: int = option(2, "New model: layers.")
    num_attention_heads: int = option(4, "New model: attention heads; they divide hidden_size.")
    dropout: float = option(0.1, "New model: dropout on embeddings, attention weights and each sublayer's output.")
    vocab_size: int = option(1000, "New model: size of the vocabulary, an upper bound.")

    def __post_init__(self) -> None:
        """Reject sizes that do not fit together, or that nobody would heed."""
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default and f.name != "model_name_or_path"]
        if self.model_name_or_path is not None and given:
            raise ValueError(f"{', '.join(given)}: options of a new model; leave them out with --model_name_or_path.")
        at_least_one(self, "hidden_size", "num_hidden_layers", "num_attention_heads")
        check_model_size(self, "num_attention_heads", "hidden_size")


DATACLASSES = (DataArguments, ModelArguments, OptimizerArguments, TextTrainingArguments)


def number_labels(splits: DatasetDict) -> tuple[DatasetDict, list[str]]:
    """Replace the column `label` by numbers from 0 on, in the column `labels`.

    Returns:
        The splits, and the names of the labels: a ClassLabel's, else the values in the training split, sorted.

    Raises:
        ValueError: A label is missing, is a fraction, or does not occur in training.
    """
    feature = splits["train"].features[LABEL]
    names = list(feature.names) if isinstance(feature, ClassLabel) else None
    values = list(range(len(names))) if names else sorted(set(splits["train"][LABEL]) - {None})
    if any(not isinstance(value, int | str) for value in values):
        raise ValueError(
            f"Labels like {values[0]!r} are no classes; choose whole numbers or strings by --label_column."
        )
    if len(values) < 2:
        raise ValueError(
            "The training split has one class alone: nothing to tell apart. Shuffle it, or take more of it."
        )
    numbers = {value: number for number, value in enumerate(values)}
    numbered = {}
    for split, rows in splits.items():
        unknown = sorted({repr(value) for value in rows[LABEL] if value not in numbers})
        if unknown:
            raise ValueError(
                f"The {split} split has labels that training does not have: {', '.join(unknown[:5])}. Splits without "
                f"labels have None or -1; a part of another split serves as well: --{split}_split 'train[90%:]'."
            )
        columns = {TEXT: list(rows[TEXT]), LABELS: [numbers[value] for value in rows[LABEL]]}
        numbered[split] = Dataset.from_dict(columns)
    return DatasetDict(numbered), names or [str(value) for value in values]


def build_model(
    tokenizer: PreTrainedTokenizerBase, model_args: ModelArguments, max_length: int, labels: Sequence[str]
) -> PreTrainedModel:
    """Load the model that was named, with a new output layer, or build a small BERT; both from torch's generator."""
    names: dict[str, Any] = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
    }
    if model_args.model_name_or_path is not None:
        return AutoModelForSequenceClassification.from_pretrained(
            model_args.model_name_or_path,
            pad_token_id=tokenizer.pad_token_id,
            ignore_mismatched_sizes=True,  # an output layer for other labels
            **names,
        )
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=model_args.hidden_size,
            num_hidden_layers=model_args.num_hidden_layers,
            num_attention_heads=model_args.num_attention_heads,
            intermediate_size=4 * model_args.hidden_size,
            hidden_dropout_prob=model_args.dropout,
            attention_probs_dropout_prob=model_args.dropout,
            max_position_embeddings=max_length,
            type_vocab_size=1,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **names,
        )
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, evaluate, write the output folder, and return what all_results.json holds."""
    data_args, model_args, optimizer_args, args = parse(DATACLASSES, argv, output_dir="outputs/text_classification")
    run = prepare(optimizer_args, args, data_args.overwrite_output_dir)
    with args.main_process_first(desc="loading the dataset"):  # the other processes find the download
        texts, labels = number_labels(load_splits(data_args, subjects.load, (TEXT, LABEL)))
    named = run.checkpoint or model_args.model_name_or_path
    # In a new tokenizer the first token stands for the whole text.
    tokenizer = load_or_train(named, texts["train"][TEXT], model_args.vocab_size, f"{EOS} $A")
    max_length = min(data_args.max_length, tokenizer.model_max_length)

    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        return dict(tokenizer(batch[TEXT], truncation=True, max_length=max_length))

    splits = encode(texts, tokenize, data_args.preprocessing_num_workers)
    run.seed()
    facts = {"recipe": "text_classification.py", "task": "text-classification", "dataset_name": data_args.dataset_name}
    return train_and_score(
        run,
        build_model(tokenizer, model_args, max_length, labels),
        tokenizer,
        splits,
        facts | {"model_name_or_path": model_args.model_name_or_path, "num_labels": len(labels)},
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_loss_func=make_loss(args.label_smoothing_factor),
        compute_metrics=accuracy,
    )


if __name__ == "__main__":
    main()
