"""From a dataset's name to tokenized splits, batches and references."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase

from common.trainer import LENGTH, drop_length
from translation import corpus
from translation.arguments import DataArguments

SOURCE, TARGET = "source", "target"


@dataclass(frozen=True)
class HeldOut:
    """A split to evaluate on.

    Attributes:
        encoded: The tokenized pairs, longest source first: batches of like lengths waste little padding.
        order: For each row of `encoded`, its position in the split.
        references: The target sentences as they are in the split, in its order.
    """

    encoded: Dataset
    order: list[int]
    references: list[str]

    def restore(self, rows: Sequence[str]) -> list[str]:
        """Bring one text for each row of `encoded` into the order of the split."""
        restored = [""] * len(self.order)
        for position, row in zip(self.order, rows, strict=True):
            restored[position] = row
        return restored


def load_pairs(arguments: DataArguments) -> DatasetDict:
    """Load the splits train, validation and test as pairs of text.

    Args:
        arguments: Dataset, languages and the number of pairs to keep.

    Returns:
        Three splits with the columns `source` and `target`.

    Raises:
        ValueError: A split, a language or a text is missing.
    """
    if arguments.dataset_name is None:
        splits = corpus.load()
    else:
        splits = load_dataset(arguments.dataset_name, arguments.dataset_config_name)
    limits = {
        "train": arguments.max_train_samples,
        "validation": arguments.max_eval_samples,
        "test": arguments.max_predict_samples,
    }
    missing = [name for name in limits if name not in splits]
    if missing:
        raise ValueError(
            f"{arguments.dataset_name} has the splits {', '.join(splits)} and lacks {', '.join(missing)}. "
            "A local folder needs the files train.jsonl, validation.jsonl (or val, dev) and test.jsonl."
        )
    return DatasetDict({name: _texts(splits[name], limit, arguments) for name, limit in limits.items()})


def training_texts(pairs: Dataset) -> Iterator[str]:
    """Yield the sentences of both languages."""
    for column in (SOURCE, TARGET):
        yield from pairs[column]


def encode(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, arguments: DataArguments, desc: str) -> Dataset:
    """Tokenize pairs of text.

    Args:
        pairs: Columns `source` and `target`.
        tokenizer: The tokenizer of both languages.
        arguments: Longest sequences, in tokens, and the number of worker processes.
        desc: Label of the progress bar.

    Returns:
        Columns input_ids, attention_mask, labels, and `length`, the tokens of the longer side, by which batches
        are grouped: on Multi30K that leaves less padding than the length of either side or their sum.
    """

    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        features = tokenizer(batch[SOURCE], max_length=arguments.max_source_length, truncation=True)
        targets = tokenizer(text_target=batch[TARGET], max_length=arguments.max_target_length, truncation=True)
        features["labels"] = targets["input_ids"]
        features[LENGTH] = [
            max(len(source), len(target))
            for source, target in zip(features["input_ids"], features["labels"], strict=True)
        ]
        return dict(features)

    return pairs.map(
        tokenize,
        batched=True,
        remove_columns=pairs.column_names,
        num_proc=arguments.preprocessing_num_workers,
        desc=desc,
    )


def hold_out(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, arguments: DataArguments, desc: str) -> HeldOut:
    """Tokenize a split to evaluate on, and sort it by the length of its sources."""
    encoded = encode(pairs, tokenizer, arguments, desc)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return HeldOut(encoded.select(order), order, list(pairs[TARGET]))


def make_collator(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """Return the function that pads a batch, drops `length` and keeps every other column."""
    return drop_length(DataCollatorForSeq2Seq(tokenizer, model=model))


def _texts(split: Dataset, limit: int | None, arguments: DataArguments) -> Dataset:
    """Reduce a split to its first `limit` pairs, in the columns `source` and `target`."""
    if limit is not None:
        split = split.select(range(min(limit, len(split))))
    nested = "translation" in split.column_names
    if nested:
        feature = split.features["translation"]
        languages = list(getattr(feature, "languages", feature))
        rows = split["translation"]
        texts = {name: [row[name] for row in rows] for name in languages}
    else:
        languages = split.column_names
        texts = {name: split[name] for name in languages}
    columns = {}
    for column, language in ((SOURCE, arguments.source_lang), (TARGET, arguments.target_lang)):
        if language not in languages:
            raise ValueError(
                f"The dataset has no language {language!r}; its {'languages' if nested else 'columns'} are "
                f"{', '.join(languages)}. Choose with --source_lang and --target_lang."
            )
        columns[column] = list(texts[language])
        for number, text in enumerate(columns[column]):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"Row {number} of split {split.split} has no text in {language!r}; remove the row.")
        columns[column] = [text.strip() for text in columns[column]]
    return Dataset.from_dict(columns)
