"""From a dataset's name to pairs of text, and from texts to tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

import corpus
from common.data import first, load_named
from text.data import stripped
from translation.arguments import DataArguments

SOURCE, TARGET = "source", "target"


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
        hint = " A local folder needs the files train.jsonl, validation.jsonl (or val, dev) and test.jsonl."
        splits = load_named(arguments, arguments.limits, hint)
    return DatasetDict(
        {name: _texts(first(splits[name], limit), name, arguments) for name, limit in arguments.limits.items()}
    )


def training_texts(pairs: Dataset) -> Iterator[str]:
    """Yield the sentences of both languages."""
    for column in (SOURCE, TARGET):
        yield from pairs[column]


def tokenize(
    tokenizer: PreTrainedTokenizerBase, arguments: DataArguments, batch: dict[str, list[str]]
) -> dict[str, Any]:
    """Return the columns input_ids, attention_mask and labels of pairs, cut where they are too long."""
    features = tokenizer(batch[SOURCE], max_length=arguments.max_source_length, truncation=True)
    targets = tokenizer(text_target=batch[TARGET], max_length=arguments.max_target_length, truncation=True)
    return {**features, "labels": targets["input_ids"]}


def _texts(rows: Dataset, split: str, arguments: DataArguments) -> Dataset:
    """Return the pairs of a split in the columns `source` and `target`."""
    nested = "translation" in rows.column_names
    if nested:
        feature = rows.features["translation"]
        pairs = list(rows["translation"])
        texts = {name: [pair[name] for pair in pairs] for name in getattr(feature, "languages", feature)}
    else:
        texts = {name: rows[name] for name in rows.column_names}
    columns = {}
    for column, language in ((SOURCE, arguments.source_lang), (TARGET, arguments.target_lang)):
        if language not in texts:
            raise ValueError(
                f"The dataset has no language {language!r}; its {'languages' if nested else 'columns'} are "
                f"{', '.join(texts)}. Choose with --source_lang and --target_lang."
            )
        columns[column] = stripped(texts[language], split, language)
    return Dataset.from_dict(columns)
