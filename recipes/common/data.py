"""Splits of a dataset, and parts of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset

from common.arguments import DatasetArguments


def load_named(arguments: DatasetArguments, wanted: Iterable[str], hint: str = "") -> DatasetDict:
    """Load the dataset that was named; raise a ValueError, with the hint, where it lacks a wanted split."""
    splits = load_dataset(arguments.dataset_name, arguments.dataset_config_name)
    missing = [name for name in wanted if name not in splits]
    if missing:
        raise ValueError(
            f"{arguments.dataset_name} has the splits {', '.join(splits)} and lacks {', '.join(missing)}.{hint}"
        )
    return splits


def shown(name: str | None) -> str | None:
    """Return a Hub id as it is, and of a local folder the name alone: reports are shared. None is none."""
    return Path(name).resolve().name if name is not None and Path(name).exists() else name


def first(rows: Dataset, limit: int | None) -> Dataset:
    """Return the first rows of a split, all where there is no limit."""
    return rows if limit is None else rows.select(range(min(limit, len(rows))))
