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

# By the number of layers: blocks of each stage, and the widths of each stage's convolutions in those of the first.
WIDE_RESNETS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
VGGS = {
    11: ((1,), (2,), (4, 4), (8, 8), (8, 8)),
    13: ((1, 1), (2, 2), (4, 4), (8, 8), (8, 8)),
    16: ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8)),
}


@dataclass
class DataArguments(DatasetArguments):
    """Which images, and how many of them."""

    max_train_samples: int = option(10_000, "Use so many training images, validation images among them.")
    max_test_samples: int | None = option(None, "Use only the first so many test images.")
    validation_samples: int = option(1000, "The last so many of the training images are kept for validation.")
    image_size: int = option(16, "Average images down to so many pixels a side.")
    augment: bool = option(
        False, "Move the training images by up to an eighth of the side, and mirror them, at random (He et al. 2016)."
    )
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

    model: Literal["mlp", "vit", "resnet", "vgg", "convnext"] = option(
        "mlp",
        "mlp: ReLU layers on all pixels; vit: a Vision Transformer; resnet, vgg: convolutions with batch norm; "
        "convnext: ConvNeXt, with layer norm.",
    )
    hidden_size: int | None = option(
        None,
        "Width, of convolutions that of the first stage. Default: 512 (mlp), 96 (vit), 16 or 64 (resnet), "
        "64 (vgg), 40 (convnext).",
    )
    num_layers: int | None = option(
        None,
        "Hidden layers. Default: 2 (mlp), 4 (vit). resnet: 20, 32, 44, ..., as for CIFAR-10, or 18 and 34, as "
        "for ImageNet; default 20. vgg: 11, 13 or 16; default 11.",
    )
    num_heads: int | None = option(None, "vit: attention heads; they divide the width. Default: 4.")
    patch_size: int | None = option(
        None, "Pixels a side of a patch; they divide image_size. Default: 4 (vit), 2 (convnext)."
    )
    dropout: float = option(0.0, "mlp, vit: dropout behind each hidden layer, or sublayer.")

    def __post_init__(self) -> None:
        """Fill in the defaults; reject sizes that do not fit together, and those that the model would ignore."""
        names = ("hidden_size", "num_layers", "num_heads", "patch_size")
        width = 64 if self.num_layers in WIDE_RESNETS else 16
        defaults = {
            "mlp": (512, 2, None, None),
            "vit": (96, 4, 4, 4),
            "resnet": (width, 20, None, None),
            "vgg": (64, 11, None, None),
            "convnext": (40, None, None, 2),
        }[self.model]
        unused = [name for name, default in zip(names, defaults, strict=True) if getattr(self, name) and not default]
        if self.dropout and self.model not in ("mlp", "vit"):
            unused.append("dropout")
        if unused:
            raise ValueError(f"--model {self.model} has no use for --{', --'.join(unused)}; leave it out.")
        for name, default in zip(names, defaults, strict=True):
            if getattr(self, name) is None:
                setattr(self, name, default)
        at_least_one(self, *names)
        check_model_size(self, *(("num_heads", "hidden_size") if self.model == "vit" else ()))
        depths = {"resnet": "18, 34 or 6 n + 2 layers, as 20 and 32", "vgg": "11, 13 or 16 layers"}
        if self.model in depths and not self.stages:
            raise ValueError(f"num_layers is {self.num_layers}; --model {self.model} has {depths[self.model]}.")

    @property
    def stages(self) -> tuple[Any, ...]:
        """What resnet and vgg are made of (`images.convolutional`); empty where there is no such depth."""
        layers = self.num_layers or 0
        if self.model == "vgg":
            return VGGS.get(layers, ())
        if layers in WIDE_RESNETS:
            return WIDE_RESNETS[layers]
        return (layers // 6,) * 3 if layers > 2 and layers % 6 == 2 else ()


@dataclass
class ImageTrainingArguments(RecipeTrainingArguments):
    """TrainingArguments with the defaults of a small classifier that is trained from scratch."""

    do_eval: bool = option(True, "Score the validation and the training split at the end.")
    do_predict: bool = option(True, "Score the test split at the end.")
    num_train_epochs: float = option(30, "Epochs.")
    lr_scheduler_type: str = option("cosine", "Schedule of the learning rate.")
    decay_at: list[float] | None = option(  # noqa: RUF009, as it returns a field
        None, "Divide the learning rate by 10 behind these shares of the steps, as 0.5 0.75; with a constant schedule."
    )
    weight_decay: float = option(0.01, "Weight decay.")
    per_device_train_batch_size: int = option(128, "Images in a training batch, on each device.")
    per_device_eval_batch_size: int = option(1000, "Images in an evaluation batch, on each device.")
    save_strategy: str = option("no", "When to write a checkpoint to resume from.")
    remove_unused_columns: bool = option(False, "Off: batches are fetched whole, in the columns of the model.")

    def __post_init__(self) -> None:
        """Reject what this recipe has no use for; the rest is checked by the Trainer."""
        super().__post_init__()
        if self.decay_at and not self.lr_scheduler_type.value.startswith("constant"):
            given = self.lr_scheduler_type.value
            raise ValueError(f"decay_at needs --lr_scheduler_type constant_with_warmup or constant, not {given}.")
        if any(not 0 < share < 1 for share in self.decay_at or ()):
            raise ValueError(f"decay_at is {self.decay_at}; each share must lie between 0 and 1.")
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
    if model.model == "convnext" and data.image_size < 8 * model.patch_size:
        raise ValueError(
            f"image_size={data.image_size} is less than eight patches of patch_size={model.patch_size}, which convnext "
            "halves three times; raise the one or lower the other."
        )
    return data, model, *others
