"""Options of the image recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from common.arguments import (
    DatasetArguments,
    OptimizerArguments,
    RecipeTrainingArguments,
    at_least_one,
    check_model_size,
    option,
    parse,
)
from common.loss import OutlierArguments


@dataclass
class DataArguments(DatasetArguments):
    """Which images, and how many of them."""

    max_train_samples: int = option(10_000, "Use so many training images, validation images among them.")
    max_test_samples: int | None = option(None, "Use only the first so many test images.")
    validation_samples: int = option(1000, "The last so many of the training images are kept for validation.")
    image_size: int = option(16, "Average images down to so many pixels a side.")
    unscaled: float = option(
        0.0, "Share of the training images whose pixels are left in 0 to 255 where the others' are in 0 to 1."
    )

    def __post_init__(self) -> None:
        """Reject values that no run can use."""
        at_least_one(self, "max_train_samples", "validation_samples", "image_size", "max_test_samples")
        if self.max_train_samples <= self.validation_samples:
            raise ValueError(
                f"max_train_samples={self.max_train_samples} leaves nothing to train on behind "
                f"validation_samples={self.validation_samples}; raise the one or lower the other."
            )
        if not 0 <= self.unscaled <= 1:
            raise ValueError(f"unscaled is {self.unscaled}; it must lie in [0, 1].")


@dataclass
class ModelArguments:
    """Which classifier, and its size."""

    model: Literal["mlp", "vit"] = option("mlp", "mlp: ReLU layers on all pixels; vit: a Vision Transformer.")
    hidden_size: int | None = option(None, "Width. Default: 512 (mlp), 96 (vit).")
    num_layers: int | None = option(None, "Hidden layers. Default: 2 (mlp), 4 (vit).")
    num_heads: int | None = option(None, "vit: attention heads; they divide the width. Default: 4.")
    patch_size: int | None = option(None, "vit: pixels a side of a patch; they divide image_size. Default: 4.")
    dropout: float = option(0.0, "Dropout behind each hidden layer (mlp), or sublayer (vit).")

    def __post_init__(self) -> None:
        """Fill in the defaults; reject sizes that do not fit together, and those that the model would ignore."""
        if self.model == "mlp" and (self.num_heads, self.patch_size) != (None, None):
            raise ValueError("--model mlp has no use for --num_heads and --patch_size; leave them out.")
        names = ("hidden_size", "num_layers", "num_heads", "patch_size")
        defaults = {"mlp": (512, 2, None, None), "vit": (96, 4, 4, 4)}[self.model]
        for name, default in zip(names, defaults, strict=True):
            if getattr(self, name) is None:
                setattr(self, name, default)
        at_least_one(self, *names)
        check_model_size(self, *(("num_heads", "hidden_size") if self.model == "vit" else ()))


@dataclass
class ImageTrainingArguments(RecipeTrainingArguments):
    """TrainingArguments with the defaults of a small classifier that is trained from scratch."""

    num_train_epochs: float = option(30, "Epochs.")
    lr_scheduler_type: str = option("cosine", "Schedule of the learning rate.")
    weight_decay: float = option(0.01, "Weight decay.")
    per_device_train_batch_size: int = option(128, "Images in a training batch, on each device.")
    per_device_eval_batch_size: int = option(1000, "Images in an evaluation batch, on each device.")
    save_strategy: str = option("no", "When to write a checkpoint to resume from.")
    remove_unused_columns: bool = option(False, "Off: batches are fetched whole, in the columns of the model.")

    def __post_init__(self) -> None:
        """Reject what this recipe has no use for; the rest is checked by the Trainer."""
        super().__post_init__()
        if self.push_to_hub:
            raise ValueError("This recipe trains models to measure them: it has no --push_to_hub.")
        if self.remove_unused_columns:
            raise ValueError("Leave --remove_unused_columns off: batches are fetched whole.")


DATACLASSES = (DataArguments, ModelArguments, OutlierArguments, OptimizerArguments, ImageTrainingArguments)


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Parse the command line into one instance of each of `DATACLASSES`; see `common.arguments.parse`.

    Raises:
        ValueError: As there, or options of different groups contradict each other.
    """
    data, model, *others = parse(DATACLASSES, argv, output_dir="outputs/images")
    if model.patch_size is not None and data.image_size % model.patch_size:
        raise ValueError(f"patch_size={model.patch_size} does not divide image_size={data.image_size}.")
    return data, model, *others
