"""Synthetic images, the way from a dataset to tensors, and the options of the image recipe."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PillowImage
from torch.utils.data import DataLoader

from images.arguments import DataArguments, parse_arguments
from images.data import Augmented, Columns, as_it_is, load
from images.synthetic import CLASSES, generate


def write_images(folder, sizes=((32, 32),), splits=("train", "test"), column="image", label=None):
    """Save a dataset of 12 images a split as parquet files: gray level 20 times the row, class the row modulo 3."""
    label = label or ClassLabel(names=["a", "b", "c"])
    folder.mkdir()
    for split in splits:
        images = [
            PillowImage.fromarray(np.full((*sizes[row % len(sizes)][::-1], 3), 20 * row, dtype=np.uint8))
            for row in range(12)
        ]
        rows = {column: images, "label": [row % 3 for row in range(12)]}
        Dataset.from_dict(rows, Features({column: Image(), "label": label})).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def test_synthetic_images_share_patterns_between_seeds():
    pixels, labels = generate(400, 8, seed=0)
    assert pixels.shape == (400, 3, 8, 8)
    assert set(labels.tolist()) == set(range(CLASSES))
    assert torch.equal(generate(400, 8, seed=0)[0], pixels)
    others, other_labels = generate(4000, 8, seed=1)
    assert not torch.equal(others[:400], pixels)
    # The nearest of 4,000 other images knows the class far better than chance.
    near = torch.cdist(pixels.flatten(1), others.flatten(1)).argmin(dim=1)
    assert (other_labels[near] == labels).double().mean() > 0.2


def test_splits_are_standardized_by_the_training_images():
    splits = load(DataArguments(max_train_samples=600, validation_samples=200, max_test_samples=50, image_size=8), 3)
    train, validation, test = splits.train.columns, splits.validation.columns, splits.test.columns
    assert (len(splits.train), len(splits.validation), len(splits.test), splits.classes) == (400, 200, 50, 10)
    assert set(train) == {"pixel_values", "labels"}
    torch.testing.assert_close(train["pixel_values"].mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(train["pixel_values"].std(dim=(0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
    true = generate(600, 8, seed=0)[1]
    assert torch.equal(torch.cat([train["labels"], validation["labels"]]), true)
    assert torch.equal(test["labels"], generate(50, 8, seed=1)[1])


def test_some_training_images_are_left_unscaled():
    sizes = {"max_train_samples": 600, "validation_samples": 200, "max_test_samples": 50, "image_size": 8}
    plain, some = (load(DataArguments(**sizes, unscaled=share), 3) for share in (0, 0.1))
    for split in ("validation", "test"):  # and by the same mean and deviation
        assert torch.equal(*(getattr(splits, split).columns["pixel_values"] for splits in (plain, some)))
    pixels, others = (splits.train.columns["pixel_values"] for splits in (plain, some))
    hit = (pixels != others).flatten(1).any(dim=1)
    assert 0.05 < hit.double().mean() < 0.15
    # Up to the mean that is subtracted, 255 times what they were.
    torch.testing.assert_close(others[hit].diff(dim=3), 255 * pixels[hit].diff(dim=3), rtol=1e-3, atol=1e-2)


def test_batches_are_fetched_whole():
    columns = Columns(labels=torch.arange(10), squares=torch.arange(10) ** 2)
    batches = list(DataLoader(columns, batch_size=4, collate_fn=as_it_is))
    assert [batch["labels"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert batches[1]["squares"].tolist() == [16, 25, 36, 49]
    assert columns[3] == {"labels": 3, "squares": 9}


@pytest.mark.parametrize("side", [8, 32])
def test_augmented_images_are_moved_and_mirrored(side):
    torch.manual_seed(0)
    pixels = torch.arange(1.0, 1 + 3 * side**2).view(1, 3, side, side).repeat(200, 1, 1, 1)
    images = Augmented(pixel_values=pixels.clone(), labels=torch.arange(200))
    batch = images.__getitems__([3, 5, *range(100)])
    assert batch["labels"].tolist() == [3, 5, *range(100)]
    reach, seen = side // 8, set()
    padded = torch.nn.functional.pad(pixels[0], (reach,) * 4)
    windows = {
        (down, right, mirrored): window.flip(2) if mirrored else window
        for down in range(2 * reach + 1)
        for right in range(2 * reach + 1)
        for mirrored in (False, True)
        for window in [padded[:, down : down + side, right : right + side]]
    }
    for image in batch["pixel_values"]:
        (found,) = [place for place, window in windows.items() if torch.equal(image, window)]
        seen.add(found)
    assert len(seen) > 0.5 * min(len(windows), 100)
    assert torch.equal(images.columns["pixel_values"], pixels)


@pytest.mark.parametrize(("column", "sizes"), [("img", [(32, 32)]), ("image", [(8, 8), (20, 11)])])
def test_datasets_become_small_images(tmp_path, column, sizes):
    name = write_images(tmp_path / "data", sizes, column=column)
    splits = load(DataArguments(dataset_name=name, validation_samples=4, image_size=8), 0)
    assert splits.classes == 3
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (8, 4, 12)
    pixels, labels = splits.test.columns["pixel_values"], splits.test.columns["labels"]
    assert labels.tolist() == [row % 3 for row in range(12)]
    assert pixels.shape == (12, 3, 8, 8)
    steps = pixels.diff(dim=0)  # equal steps of gray
    torch.testing.assert_close(steps, steps.mean().expand_as(steps))
    # Training images are shuffled together with their labels.
    both = torch.cat([splits.train.columns["pixel_values"], splits.validation.columns["pixel_values"]])
    order = both[:, 0, 0, 0].argsort()
    assert torch.cat([splits.train.columns["labels"], splits.validation.columns["labels"]])[order].tolist() == [
        row % 3 for row in range(12)
    ]


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"splits": ["train"]}, {}, "has the splits train and lacks test"),
        ({"column": "picture"}, {}, r"needs the columns 'img' \(or 'image'\) and 'label', it has picture, label"),
        ({"sizes": [(7, 32)]}, {}, "7 x 32 pixels, fewer than image_size=8"),
        ({}, {"validation_samples": 12}, "has 12 training images, validation_samples=12 leaves none"),
    ],
)
def test_a_dataset_that_does_not_fit_is_told(tmp_path, changes, options, message):
    name = write_images(tmp_path / "data", **changes)
    arguments = DataArguments(**{"dataset_name": name, "validation_samples": 4, "image_size": 8} | options)
    with pytest.raises(ValueError, match=message):
        load(arguments, 0)


def test_labels_without_names_are_counted(tmp_path):
    name = write_images(tmp_path / "data", label=Value("int64"))
    assert load(DataArguments(dataset_name=name, validation_samples=4, image_size=8), 0).classes == 3


def parse(tmp_path, *argv):
    return parse_arguments([f"--output_dir={tmp_path}", *argv])


def test_defaults_fit_the_model(tmp_path):
    data, model, outliers, optimizer, training = parse(tmp_path)
    assert (data.dataset_name, data.max_train_samples, data.unscaled) == (None, 10_000, 0)
    assert (model.model, model.hidden_size, model.num_layers, model.patch_size) == ("mlp", 512, 2, None)
    assert (outliers.outliers, outliers.loss_bound, outliers.clip_outputs) == (0, None, False)
    assert optimizer.optimizer == "fngd"
    assert (training.num_train_epochs, training.lr_scheduler_type.value) == (30, "cosine")
    assert not training.remove_unused_columns
    resnets = [parse(tmp_path, "--model=resnet", f"--num_layers={layers}")[1] for layers in (20, 32, 18, 34)]
    assert [(model.hidden_size, model.stages) for model in resnets] == [
        (16, (3, 3, 3)),
        (16, (5, 5, 5)),
        (64, (2, 2, 2, 2)),
        (64, (3, 4, 6, 3)),
    ]
    vit = parse(tmp_path, "--model=vit", "--num_layers=2")[1]
    assert (vit.hidden_size, vit.num_layers, vit.num_heads, vit.patch_size) == (96, 2, 4, 4)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--unscaled=-0.1"], r"unscaled is -0.1; it must lie in \[0, 1\]"),
        (["--max_train_samples=1000"], "leaves nothing to train on behind validation_samples=1000"),
        (["--image_size=0"], "image_size is 0"),
        (["--patch_size=4"], "mlp has no use for --patch_size; leave it out"),
        (["--model=vgg", "--num_heads=4", "--dropout=0.1"], "vgg has no use for --num_heads, --dropout"),
        (["--model=convnext", "--num_layers=4"], "convnext has no use for --num_layers"),
        (["--model=convnext", "--patch_size=4"], "image_size=16 is less than eight patches of patch_size=4"),
        (["--model=resnet", "--num_layers=22"], "num_layers is 22; --model resnet has 18, 34 or 6 n"),
        (["--model=resnet", "--num_layers=2"], "num_layers is 2; --model resnet has 18, 34 or 6 n"),
        (["--model=vgg", "--num_layers=12"], "num_layers is 12; --model vgg has 11, 13 or 16"),
        (["--decay_at", "0.5"], "decay_at needs --lr_scheduler_type constant_with_warmup or constant, not cosine"),
        (["--decay_at", "50", "--lr_scheduler_type=constant"], r"each share must lie between 0 and 1"),
        (["--model=vit", "--patch_size=5"], "patch_size=5 does not divide image_size=16"),
        (["--model=vit", "--num_heads=5"], "num_heads=5 does not divide hidden_size=96"),
        (["--num_layers=0"], "num_layers is 0"),
        (["--dropout=1"], "dropout is 1.0"),
        (["--outlier_scale=10"], "--outlier_scale needs --outliers"),
        (["--outliers=-1"], "outliers is -1"),
        (["--remove_unused_columns=true"], "Leave --remove_unused_columns off"),
        (["--push_to_hub=true"], "no --push_to_hub"),
        (["--optim=sgd"], "Set --optimizer instead of --optim sgd"),
        (["--unscale=0.1"], "did you mean unscaled"),
    ],
)
def test_bad_options_name_the_fix(tmp_path, argv, message):
    with pytest.raises(ValueError, match=message):
        parse(tmp_path, *argv)
