"""From a dataset's name to tensors: images averaged down and standardized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Array3D, Dataset, Features
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F

from common.data import first, load_named
from images import synthetic
from images.arguments import DataArguments

_SHUFFLE_SEED = 0  # which images are used: the same in every run
_TRAIN, _TEST = 0, 1  # seeds of the synthetic images
_TEST_SIZE = 2000


class Columns(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of tensors in memory, fetched a batch at a time: no row is ever touched by itself.

    Args:
        **columns: Tensors `[n, ...]` of equal length.
    """

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: column[row] for name, column in self.columns.items()}

    def __getitems__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        chosen = torch.tensor(rows)
        return {name: column[chosen] for name, column in self.columns.items()}


class Augmented(Columns):
    """Images that come moved by up to an eighth of the side, with zeros at the rim, and mirrored, half of them.

    Drawn from torch's global generator, which Trainer restores where it resumes, at the beginning of an epoch. Within
    one an interrupted run goes on with other draws.
    """

    def __getitems__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        batch = super().__getitems__(rows)
        return batch | {"pixel_values": moved(batch["pixel_values"])}


def moved(pixels: Tensor) -> Tensor:
    """Move and mirror images `[n, C, S, S]`, each by itself."""
    size, side = len(pixels), pixels.shape[-1]
    reach = side // 8
    down, right = torch.randint(0, 2 * reach + 1, (2, size, 1)) + torch.arange(side)
    right = torch.where(torch.rand(size, 1) < 0.5, right.flip(1), right)
    padded = F.pad(pixels, (reach,) * 4)
    # The indices broadcast to [n, S, S], which puts the channels last.
    return padded[torch.arange(size)[:, None, None], :, down[:, :, None], right[:, None, :]].permute(0, 3, 1, 2)


def as_it_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Collate what `Columns` has fetched, which is a batch already."""
    return batch


@dataclass(frozen=True)
class Splits:
    """What a run is trained and measured on, in the columns `pixel_values` and `labels`, and the number of classes."""

    train: Columns
    validation: Columns
    test: Columns
    classes: int


def load(arguments: DataArguments, seed: int) -> Splits:
    """Load, and standardize by the mean and the deviation of each channel in the training images.

    Args:
        arguments: Dataset and sizes.
        seed: Decides which images are left unscaled.

    Raises:
        ValueError: A split, a column or enough images are missing.
    """
    if arguments.dataset_name is None:
        pixels, labels = synthetic.generate(arguments.max_train_samples, arguments.image_size, _TRAIN)
        test_size = _TEST_SIZE if arguments.max_test_samples is None else arguments.max_test_samples
        test_pixels, test_labels = synthetic.generate(test_size, arguments.image_size, _TEST)
        classes = synthetic.CLASSES
    else:
        splits = load_named(arguments, ("train", "test"))
        train = splits["train"].shuffle(seed=_SHUFFLE_SEED)
        pixels, labels = _tensors(first(train, arguments.max_train_samples), arguments.image_size)
        test_pixels, test_labels = _tensors(first(splits["test"], arguments.max_test_samples), arguments.image_size)
        names = getattr(train.features["label"], "names", None)
        classes = len(names) if names else int(max(labels.max(), test_labels.max())) + 1
    size = len(pixels) - arguments.validation_samples
    if size < 1:
        raise ValueError(
            f"The dataset has {len(pixels)} training images, validation_samples={arguments.validation_samples} leaves "
            "none to train on; lower it."
        )
    mean = pixels[:size].mean(dim=(0, 2, 3), keepdim=True)
    deviation = pixels[:size].std(dim=(0, 2, 3), keepdim=True).clamp(min=1e-6)
    pixels = torch.cat([leave_unscaled(pixels[:size], arguments.unscaled, seed), pixels[size:]])
    pixels, test_pixels = (pixels - mean) / deviation, (test_pixels - mean) / deviation
    return Splits(
        train=(Augmented if arguments.augment else Columns)(pixel_values=pixels[:size], labels=labels[:size]),
        validation=Columns(pixel_values=pixels[size:], labels=labels[size:]),
        test=Columns(pixel_values=test_pixels, labels=test_labels),
        classes=classes,
    )


def leave_unscaled(pixels: Tensor, share: float, seed: int) -> Tensor:
    """Return images `[n, 3, S, S]` of which a share, drawn by the seed, is in 0 to 255, as it was before scaling."""
    hit = torch.rand(len(pixels), generator=torch.Generator().manual_seed(seed)) < share
    return torch.where(hit.view(-1, 1, 1, 1), 255 * pixels, pixels)


def _tensors(split: Dataset, image_size: int) -> tuple[Tensor, Tensor]:
    """Return pixels `[n, 3, image_size, image_size]` in [0, 1] and labels `[n]`; `datasets` caches the pixels."""
    columns = [name for name in ("img", "image") if name in split.column_names]
    if not columns or "label" not in split.column_names:
        raise ValueError(
            f"The dataset needs the columns 'img' (or 'image') and 'label', it has {', '.join(split.column_names)}."
        )
    small = split.map(
        _average_down,
        input_columns=columns[0],
        fn_kwargs={"image_size": image_size},
        batched=True,
        remove_columns=split.column_names,
        features=Features({"pixels": Array3D((3, image_size, image_size), "float32")}),
        desc="Averaging images down",
    )
    return torch.from_numpy(small.with_format("numpy")[:]["pixels"]), torch.tensor(list(split["label"]))


def _average_down(images: list[Image], image_size: int) -> dict[str, list[np.ndarray]]:
    """Average images down to a square, in RGB, values in [0, 1]."""
    pixels = []
    for image in images:
        if min(image.size) < image_size:
            raise ValueError(
                f"An image has {image.width} x {image.height} pixels, fewer than image_size={image_size}; lower it."
            )
        values = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255
        pixels.append(F.adaptive_avg_pool2d(values, image_size).numpy())
    return {"pixels": pixels}
