"""Options of the image recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import TrainingArguments

from common.arguments import OptimizerArguments, at_least_one, check_training_arguments, option, parse
from common.outliers import OutlierArguments

LABEL_NOISE = 0.4  # where neither a share nor rates are given


@dataclass
class DataArguments:
    """Which images, how many of them, and how many of their labels are wrong."""

    dataset_name: str | None = option(
        None, "Hub id or local folder with train and test splits of images. Default: synthetic images."
    )
    dataset_config_name: str | None = option(None, "Configuration of the dataset, where it has several.")
    max_train_samples: int = option(10_000, "Use so many training images, validation images among them.")
    max_test_samples: int | None = option(None, "Use only the first so many test images.")
    validation_samples: int = option(
        1000, "The last so many of the training images, labels as noisy as theirs, are kept for validation."
    )
    image_size: int = option(16, "Average images down to so many pixels a side.")
    label_noise: float | None = option(
        None,
        f"Share of labels replaced by uniformly random ones. Default: {LABEL_NOISE}, or --noise_rates where given.",
    )
    noise_rates: str | None = option(
        None, "JSON file of confusion matrices by name; a row holds a true class's shares of given labels."
    )
    noise_kind: str | None = option(None, "Name of the matrix in the file of --noise_rates.")
    noise_seed: int | None = option(None, "Seed of the wrong labels. Default: --seed.")
    unscaled: float = option(
        0.0, "Share of the training images whose pixels are left in 0 to 255 where the others' are in 0 to 1."
    )
    folds: int = option(
        0,
        "Afterwards, train so many models more, each without one part of the training images, and report how well the "
        "probability that it gives their labels finds the wrong ones (cleanlab's self-confidence). 0: none.",
    )
    overwrite_output_dir: bool = option(
        False, "Start anew: delete the checkpoints in output_dir instead of resuming from the last one."
    )

    def __post_init__(self) -> None:
        """Reject values that no run can use."""
        if self.folds < 0 or self.folds == 1:
            raise ValueError(f"folds is {self.folds}; it must be 0, or at least 2.")
        for name in ("max_train_samples", "validation_samples", "image_size"):
            at_least_one(self, name)
        if self.max_test_samples is not None:
            at_least_one(self, "max_test_samples")
        if self.max_train_samples <= self.validation_samples:
            raise ValueError(
                f"max_train_samples={self.max_train_samples} leaves nothing to train on behind "
                f"validation_samples={self.validation_samples}; raise the one or lower the other."
            )
        if (self.noise_rates is None) != (self.noise_kind is None):
            raise ValueError("Give --noise_rates (the file) and --noise_kind (the matrix in it) together.")
        if self.noise_rates is not None:
            if self.label_noise is not None:
                raise ValueError("Give --label_noise or --noise_rates, not both.")
            if not Path(self.noise_rates).is_file():
                raise ValueError(f"noise_rates {self.noise_rates!r} is no file.")
        elif self.label_noise is None:
            self.label_noise = LABEL_NOISE
        if self.label_noise is not None and not 0 <= self.label_noise <= 1:
            raise ValueError(f"label_noise is {self.label_noise}; it must lie in [0, 1].")
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
        defaults = {"mlp": (512, 2, None, None), "vit": (96, 4, 4, 4)}[self.model]
        for name, default in zip(("hidden_size", "num_layers", "num_heads", "patch_size"), defaults, strict=True):
            if getattr(self, name) is None:
                setattr(self, name, default)
            elif getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.num_heads is not None and self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must lie in [0, 1).")


@dataclass
class LossArguments(OutlierArguments):
    """The training loss; evaluation measures the plain cross entropy, whatever it is.

    Label smoothing is TrainingArguments' label_smoothing_factor.
    """

    loss: Literal["cross_entropy", "gce", "small_loss"] = option(
        "cross_entropy",
        "gce: generalized cross entropy (Zhang and Sabuncu, 2018); small_loss: cross entropy of the samples that have "
        "the smallest in their batch.",
    )
    gce_q: float | None = option(None, "gce: q of (1 - p^q) / q, in (0, 1]; 1 is 1 - p. Default: 0.7.")
    trim: float | None = option(None, "small_loss: share of each batch that is dropped, in [0, 1). Default: 0.4.")
    trim_epochs: float | None = option(
        None, "small_loss: epochs over which the share grows linearly from 0 to --trim. Default: 10."
    )

    def __post_init__(self) -> None:
        """Fill in the defaults; reject what is out of range or would be ignored."""
        super().__post_init__()
        users = {"gce_q": "gce", "trim": "small_loss", "trim_epochs": "small_loss"}
        for name, user in users.items():
            if getattr(self, name) is not None and self.loss != user:
                raise ValueError(f"--loss {self.loss} has no use for --{name}, which --loss {user} takes.")
        for name, default in {"gce_q": 0.7, "trim": 0.4, "trim_epochs": 10.0}.items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        if not 0 < self.gce_q <= 1:
            raise ValueError(f"gce_q is {self.gce_q}; it must lie in (0, 1]. For cross entropy set --loss.")
        if not 0 <= self.trim < 1:
            raise ValueError(f"trim is {self.trim}; it must lie in [0, 1).")
        if self.trim_epochs < 0:
            raise ValueError(f"trim_epochs is {self.trim_epochs}; it must be at least 0.")


@dataclass
class ImageTrainingArguments(TrainingArguments):
    """TrainingArguments with the defaults of a small classifier that is trained from scratch."""

    output_dir: str = option("outputs/images", "Folder of the model and the results.")
    do_train: bool = option(True, "Always on; both held-out splits are always evaluated too.")
    num_train_epochs: float = option(30, "Epochs.")
    learning_rate: float = option(1e-3, "Peak learning rate.")
    lr_scheduler_type: str = option("cosine", "Schedule of the learning rate.")
    weight_decay: float = option(0.01, "Weight decay.")
    per_device_train_batch_size: int = option(128, "Images in a training batch, on each device.")
    per_device_eval_batch_size: int = option(1000, "Images in an evaluation batch, on each device.")
    eval_strategy: str = option("epoch", "When to evaluate the noisy validation images and the clean test images.")
    logging_strategy: str = option("epoch", "When to log the training loss.")
    save_strategy: str = option("no", "When to write a checkpoint to resume from.")
    save_total_limit: int | None = option(1, "Checkpoints to keep.")
    remove_unused_columns: bool = option(False, "Off, so that each sample's index reaches loss and optimizer.")

    def __post_init__(self) -> None:
        """Reject what this recipe has no use for; the rest is checked by the Trainer."""
        super().__post_init__()
        check_training_arguments(self)
        if self.push_to_hub:
            raise ValueError("This recipe trains models to measure them: it has no --push_to_hub.")
        if self.remove_unused_columns:
            raise ValueError("Leave --remove_unused_columns off: the index of each sample is needed.")


DATACLASSES = (DataArguments, ModelArguments, LossArguments, OptimizerArguments, ImageTrainingArguments)


def parse_arguments(
    argv: Sequence[str] | None = None,
) -> tuple[DataArguments, ModelArguments, LossArguments, OptimizerArguments, ImageTrainingArguments]:
    """Parse the command line; see `common.arguments.parse`.

    Raises:
        ValueError: As there, or options of different groups contradict each other.
    """
    parsed: tuple[Any, ...] = parse(DATACLASSES, argv)
    data, model, loss, optimizer, training = parsed
    if model.patch_size is not None and data.image_size % model.patch_size:
        raise ValueError(f"patch_size={model.patch_size} does not divide image_size={data.image_size}.")
    if loss.loss == "gce" and training.label_smoothing_factor:
        raise ValueError("--loss gce takes no label smoothing: set --label_smoothing_factor 0.")
    return data, model, loss, optimizer, training
