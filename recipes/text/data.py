"""From a dataset's name to splits of texts, and from texts to tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from datasets import Dataset, DatasetDict, Features, ReadInstruction, load_dataset

from common.data import first
from text.arguments import TextArguments

TEXT, LENGTH = "text", "length"
APART = "Take parts that are apart, as --train_split 'train[:90%]' --{}_split 'train[90%:]'."
"""What to do where a split is missing, or shares rows with another."""


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
        ValueError: A split, a column or a text is missing, or two splits have rows in common.
    """
    source = embedded() if arguments.dataset_name is None else None
    splits: dict[str, Dataset] = {}
    parts: defaultdict[str, list[tuple[str, int, int]]] = defaultdict(list)
    for name, limit in arguments.limits.items():
        split = getattr(arguments, f"{name}_split")
        if source is None:
            rows = _load(arguments, name, split)
        elif split in source:
            rows = source[split]
        else:
            raise ValueError(f"--{name}_split: the embedded data has no {split!r}, it has {', '.join(source)}.")
        if source is None and rows.info.splits is not None:
            parts[name] = _parts(split, {each: info.num_examples for each, info in rows.info.splits.items()}, limit)
        names = {column: getattr(arguments, f"{column}_column") for column in columns}
        splits[name] = _columns(first(rows, limit), name, names)
    for one, other in combinations(arguments.apart, 2):
        if any(a < d and c < b for place, a, b in parts[one] for also, c, d in parts[other] if place == also):
            raise ValueError(
                f"--{one}_split {getattr(arguments, f'{one}_split')} and --{other}_split "
                f"{getattr(arguments, f'{other}_split')} have rows in common. {APART.format(other)}"
            )
    return DatasetDict(splits)


def _parts(split: str, sizes: Mapping[str, int], limit: int | None) -> list[tuple[str, int, int]]:
    """Return the splits, each with its first row and the one behind its last, that a specification like this reads."""
    found, left = [], sum(sizes.values()) if limit is None else limit
    for part in ReadInstruction.from_spec(split).to_absolute(sizes):
        found.append((part.splitname, part.from_, min(part.to, part.from_ + left)))
        left = max(0, left - (part.to - part.from_))
    return found


def stripped(texts: Sequence[Any], split: str, column: str) -> list[str]:
    """Return texts without white space around them; raise a ValueError where one is missing."""
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"Row {number} of the {split} split has no text in {column!r}; remove the row.")
    return [text.strip() for text in texts]


def encode(
    splits: DatasetDict, tokenize: Callable[[dict[str, list[Any]]], Mapping[str, list[Any]]], workers: int | None
) -> DatasetDict:
    """Tokenize splits.

    Args:
        splits: Columns of texts, and others.
        tokenize: Takes a batch of the columns; returns the columns input_ids and, of sequences to predict, labels.
        workers: Number of worker processes.

    Returns:
        The splits with more columns: those of `tokenize`, and `length`, the tokens of the longer side, by which
        batches are grouped: on Multi30K that leaves less padding than the length of either side or their sum.
    """

    def columns(batch: dict[str, list[Any]]) -> dict[str, Any]:
        features = tokenize(batch)
        sides = (features[name] for name in ("input_ids", "labels") if name in features)
        return {**features, LENGTH: [max(map(len, row)) for row in zip(*sides, strict=True)]}

    return DatasetDict(
        {
            name: rows.map(columns, batched=True, num_proc=workers, desc=f"Tokenizing {name}")
            for name, rows in splits.items()
        }
    )


def draw_shots(labels: Sequence[int], shots: int, seed: int) -> tuple[list[int], list[int]]:
    """Draw so many rows of each class.

    Returns:
        The places of the rows that were drawn, and of the others, both in ascending order.

    Raises:
        ValueError: A class has fewer rows.
    """
    numbers, drawn, generator = torch.tensor(labels), [], torch.Generator().manual_seed(seed)
    for label in numbers.unique().tolist():
        places = (numbers == label).nonzero().flatten()
        if len(places) < shots:
            raise ValueError(
                f"Class {label} has {len(places)} training rows to draw {shots} from: lower --shots or "
                "--validation_shots."
            )
        drawn += places[torch.randperm(len(places), generator=generator)[:shots]].tolist()
    return sorted(drawn), sorted(set(range(len(labels))) - set(drawn))


def longest_first(rows: Dataset) -> Dataset:
    """Sort tokenized rows so that batches of like lengths waste little padding."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    return rows.select(sorted(range(len(lengths)), key=lambda row: -lengths[row]))


def _load(arguments: TextArguments, name: str, split: str) -> Dataset:
    try:
        return load_dataset(arguments.dataset_name, arguments.dataset_config_name, split=split)
    except ValueError as error:
        if "split" not in str(error).lower():
            raise
        raise ValueError(
            f"--{name}_split {split}: {error} A part of another split serves as well. {APART.format(name)}"
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
    values[TEXT] = stripped(values[TEXT], split, names[TEXT])
    return Dataset.from_dict(values, features=Features({new: rows.features[old] for new, old in names.items()}))
