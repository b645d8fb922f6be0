"""Options that the recipes on texts share."""

from __future__ import annotations

from dataclasses import dataclass

from common.arguments import DatasetArguments, at_least_one, option


@dataclass
class RowArguments(DatasetArguments):
    """How many rows of the data to use."""

    max_train_samples: int | None = option(None, "Use only the first so many training rows.")
    max_eval_samples: int | None = option(None, "Use only the first so many validation rows.")
    max_predict_samples: int | None = option(None, "Use only the first so many test rows.")

    def __post_init__(self) -> None:
        """Reject values that no run can use."""
        at_least_one(self, "max_train_samples", "max_eval_samples", "max_predict_samples")

    @property
    def limits(self) -> dict[str, int | None]:
        """The rows to use of each split, by its name."""
        return {"train": self.max_train_samples, "validation": self.max_eval_samples, "test": self.max_predict_samples}


@dataclass
class TokenizedArguments(RowArguments):
    """How the rows are tokenized, before the training."""

    preprocessing_num_workers: int | None = option(None, "Processes that tokenize the dataset.")

    def __post_init__(self) -> None:
        """Reject values that no run can use."""
        super().__post_init__()
        at_least_one(self, "preprocessing_num_workers")


@dataclass
class TextArguments(TokenizedArguments):
    """Which texts of a dataset, of the recipes on single texts."""

    text_column: str = option("text", "Column of the texts.")
    train_split: str = option("train", "Split to train on, or a part of one: 'train[:9000]'.")
    validation_split: str = option("validation", "Split to validate on, or a part of one: 'train[9000:]'.")
    test_split: str = option("test", "Split to test on, or a part of one.")

    @property
    def apart(self) -> tuple[str, ...]:
        """The splits that may have no row in common."""
        return ("train", "validation", "test")
