"""From a dataset's name to pairs of text, and from texts to tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase

import corpus
from common.data import first, load_named
from text.data import stripped
from translation.arguments import FORMATS, DataArguments, PairArguments, name_of_test_set

SOURCE, TARGET = "source", "target"


def load_pairs(arguments: PairArguments) -> DatasetDict:
    """Load the splits train, validation and test as pairs of text.

    Args:
        arguments: Dataset, languages and the number of pairs to keep.

    Returns:
        Three splits, and the test sets beside them by their names, with the columns `source` and `target`.

    Raises:
        ValueError: A split, a file, a language or a text is missing.
    """
    if arguments.dataset_name is None:
        splits = corpus.load()
    else:
        hint = " A local folder needs the files train.jsonl, validation.jsonl (or val, dev) and test.jsonl."
        splits = load_named(arguments, arguments.limits, hint)
    wanted = {name: (splits[name], limit) for name, limit in arguments.limits.items()}
    for test_set in arguments.test_sets or ():
        rows = splits[test_set] if test_set in splits else _load_file(test_set, splits)
        wanted[name_of_test_set(test_set)] = rows, arguments.max_predict_samples
    return DatasetDict({name: _texts(first(rows, limit), name, arguments) for name, (rows, limit) in wanted.items()})


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


def _load_file(test_set: str, splits: DatasetDict) -> Dataset:
    """Load a file of pairs."""
    file = Path(test_set)
    if file.suffix not in FORMATS or not file.is_file():
        raise ValueError(
            f"test_sets has {test_set!r}, which is no file that ends in {', '.join(FORMATS)}, and none of the "
            f"dataset's splits: {', '.join(splits)}."
        )
    return load_dataset(FORMATS[file.suffix], data_files=str(file), split="train")


def _texts(rows: Dataset, split: str, arguments: PairArguments) -> Dataset:
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
