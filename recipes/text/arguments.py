"""Options that the recipes on single sentences share."""

from __future__ import annotations

from dataclasses import dataclass, fields

from common.arguments import at_least_one, option


@dataclass
class TextArguments:
    """Which texts, and how many of them."""

    dataset_name: str | None = option(None, "Hub id or local folder of the dataset. Default: the embedded data.")
    dataset_config_name: str | None = option(None, "Configuration of the dataset, where it has several.")
    text_column: str = option("text", "Column of the texts.")
    train_split: str = option("train", "Split to train on, or a part of one: 'train[:90%]'.")
    validation_split: str = option("validation", "Split to validate on, or a part of one: 'train[90%:]'.")
    test_split: str = option("test", "Split to test on, or a part of one.")
    max_train_samples: int | None = option(None, "Use only the first so many training rows.")
    max_eval_samples: int | None = option(None, "Use only the first so many validation rows.")
    max_predict_samples: int | None = option(None, "Use only the first so many test rows.")
    preprocessing_num_workers: int | None = option(None, "Processes that tokenize the dataset.")
    overwrite_output_dir: bool = option(
        False, "Start anew: delete the checkpoints in output_dir instead of resuming from the last one."
    )

    def __post_init__(self) -> None:
        """Reject values that no run can use."""
        for name in (f.name for f in fields(self) if f.name.startswith(("max_", "preprocessing_"))):
            if getattr(self, name) is not None:
                at_least_one(self, name)


def check_dropout(dropout: float) -> None:
    """Raise a ValueError where a dropout probability is out of range."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; it must lie in [0, 1).")
