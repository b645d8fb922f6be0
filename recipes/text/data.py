"""From a dataset's name to splits of texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset, DatasetDict, Features, load_dataset

from common.trainer import LENGTH
from text.arguments import TextArguments

TEXT = "text"


def load_splits(
    arguments: TextArguments, embedded: Callable[[], DatasetDict], columns: Sequence[str] = (TEXT,)
) -> DatasetDict:
    """Load the splits train, validation and test.

    Args:
        arguments: Dataset, splits, columns and the number of rows to keep.
        embedded: Returns the data to take where no dataset is named.
        columns: The columns to keep; `arguments.NAME_column` is that of NAME in the dataset.

    Returns:
        Three splits with these columns, their texts without white space around them.

    Raises:
        ValueError: A split, a column or a text is missing.
    """
    wanted = {
        "train": (arguments.train_split, arguments.max_train_samples),
        "validation": (arguments.validation_split, arguments.max_eval_samples),
        "test": (arguments.test_split, arguments.max_predict_samples),
    }
    source = embedded() if arguments.dataset_name is None else None
    splits = {}
    for name, (split, limit) in wanted.items():
        if source is None:
            rows = _load(arguments, name, split)
        elif split in source:
            rows = source[split]
        else:
            raise ValueError(f"--{name}_split: the embedded data has no {split!r}, it has {', '.join(source)}.")
        rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
        splits[name] = _columns(rows, name, {column: getattr(arguments, f"{column}_column") for column in columns})
    return DatasetDict(splits)


def encode(rows: Dataset, tokenize: Callable[[list[str]], dict[str, Any]], workers: int | None, desc: str) -> Dataset:
    """Tokenize texts.

    Args:
        rows: The column `text`, and others.
        tokenize: Returns the columns of a list of texts, of which input_ids is one.
        workers: Number of worker processes.
        desc: Label of the progress bar.

    Returns:
        The other columns, those of `tokenize`, and `length`, the number of tokens, by which batches are grouped.
    """

    def columns(batch: dict[str, list[Any]]) -> dict[str, Any]:
        features = tokenize(batch[TEXT])
        return {**features, LENGTH: [len(ids) for ids in features["input_ids"]]}

    return rows.map(columns, batched=True, remove_columns=[TEXT], num_proc=workers, desc=desc)


def _load(arguments: TextArguments, name: str, split: str) -> Dataset:
    try:
        return load_dataset(arguments.dataset_name, arguments.dataset_config_name, split=split)
    except ValueError as error:
        if "split" not in str(error).lower():
            raise
        raise ValueError(
            f"--{name}_split {split}: {error} A part of a split serves as well: --{name}_split 'train[90%:]'."
        ) from error


def _columns(rows: Dataset, split: str, names: Mapping[str, str]) -> Dataset:
    """Reduce a split to columns of new names, given the old ones."""
    for new, old in names.items():
        if old not in rows.column_names:
            raise ValueError(
                f"The {split} split has no column {old!r}; its columns are {', '.join(rows.column_names)}. "
                f"Choose with --{new}_column."
            )
    values = {new: list(rows[old]) for new, old in names.items()}
    for number, text in enumerate(values[TEXT]):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"Row {number} of the {split} split has no text in {names[TEXT]!r}; remove the row.")
    values[TEXT] = [text.strip() for text in values[TEXT]]
    return Dataset.from_dict(values, features=Features({new: rows.features[old] for new, old in names.items()}))
