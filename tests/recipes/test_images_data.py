"""Noise, synthetic images, and the way from a dataset to tensors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PillowImage
from torch.utils.data import DataLoader

from hf_fngd.sharing import INDEX_COLUMN
from images.arguments import DataArguments
from images.data import Columns, as_it_is, load
from images.noise import corrupt, read_rates, uniform_rates
from images.synthetic import CLASSES, generate

RATES = [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.25, 0.25, 0.501]]


@pytest.fixture
def rates_file(tmp_path):
    def write(**values):
        file = tmp_path / "rates.json"
        file.write_text(json.dumps(values), encoding="utf-8")
        return file

    return write


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


@pytest.mark.parametrize(("share", "wrong"), [(0.0, 0.0), (0.4, 0.36), (1.0, 0.9)])
def test_uniform_noise_replaces_its_share_some_of_it_by_the_same_label(share, wrong):
    labels = torch.arange(20_000) % 10
    noisy = corrupt(labels, uniform_rates(10, share), seed=1)
    assert (noisy != labels).double().mean().item() == pytest.approx(wrong, abs=0.01)
    assert torch.equal(noisy, corrupt(labels, uniform_rates(10, share), seed=1))
    if share:
        assert not torch.equal(noisy, corrupt(labels, uniform_rates(10, share), seed=2))


def test_noise_draws_from_the_row_of_the_true_class_and_from_no_other_generator(rates_file):
    rates = read_rates(rates_file(kind=RATES, source="a paper"), "kind", None, 3)
    torch.testing.assert_close(rates.sum(dim=1), torch.ones(3, dtype=torch.float64))
    labels = torch.arange(30_000) % 3
    torch.manual_seed(0)
    noisy = corrupt(labels, rates, seed=0)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), after)
    found = torch.stack([noisy[labels == c].bincount(minlength=3) / 10_000 for c in range(3)]).double()
    torch.testing.assert_close(found, rates, atol=0.02, rtol=0)
    assert torch.equal(found == 0, rates == 0)


@pytest.mark.parametrize(
    ("values", "names", "message"),
    [
        ({"worse": RATES, "random1": RATES}, None, "no matrix 'kind'; set --noise_kind to worse or random1"),
        ({"kind": RATES, "classes": ["a", "c", "b"]}, ["a", "b", "c"], r"classes \['a', 'c', 'b'\], the dataset has"),
        ({"kind": RATES[:2]}, None, r"shape \(2, 3\); the dataset has 3 classes"),
        ({"kind": [[0.5, 0.5, 0.5]] * 3}, None, "add up to 1"),
        ({"kind": [[1.5, -0.5, 0]] * 3}, None, "add up to 1"),
        ({"kind": [[1.0], [1.0, 0.0]]}, None, "no matrix of numbers"),
    ],
)
def test_bad_rates_name_the_fix(rates_file, values, names, message):
    with pytest.raises(ValueError, match=message):
        read_rates(rates_file(**values), "kind", names, 3)


@pytest.mark.parametrize(("text", "message"), [("{", "is no JSON"), ("[]", "holds a list")])
def test_a_file_of_something_else_is_told(tmp_path, text, message):
    file = tmp_path / "rates.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_rates(file, "kind", None, 3)


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


def test_splits_are_standardized_and_noisy_where_they_should_be():
    splits = load(DataArguments(max_train_samples=600, validation_samples=200, max_test_samples=50, image_size=8), 3)
    train, validation, test = splits.train.columns, splits.validation.columns, splits.test.columns
    assert (len(splits.train), len(splits.validation), len(splits.test), splits.classes) == (400, 200, 50, 10)
    assert set(train) == {"pixel_values", "labels", INDEX_COLUMN}
    torch.testing.assert_close(train["pixel_values"].mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(train["pixel_values"].std(dim=(0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
    true = generate(600, 8, seed=0)[1]
    assert torch.equal(splits.true_labels, true[:400])
    assert 0.25 < (validation["labels"] != true[400:]).double().mean() < 0.47
    assert 0.25 < splits.wrong.double().mean() < 0.47
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


def test_the_noise_has_a_seed_of_its_own():
    sizes = {"max_train_samples": 300, "validation_samples": 100, "max_test_samples": 10, "image_size": 8}
    given = [load(DataArguments(**sizes, noise_seed=5), seed).train.columns["labels"] for seed in (0, 1)]
    assert torch.equal(*given)
    by_seed = [load(DataArguments(**sizes), seed).train.columns["labels"] for seed in (0, 1)]
    assert not torch.equal(*by_seed)


def test_batches_are_fetched_whole():
    columns = Columns(labels=torch.arange(10), squares=torch.arange(10) ** 2)
    batches = list(DataLoader(columns, batch_size=4, collate_fn=as_it_is))
    assert [batch["labels"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert batches[1]["squares"].tolist() == [16, 25, 36, 49]
    assert columns[3] == {"labels": 3, "squares": 9}


@pytest.mark.parametrize(("column", "sizes"), [("img", [(32, 32)]), ("image", [(8, 8), (20, 11)])])
def test_datasets_become_small_images(tmp_path, column, sizes):
    name = write_images(tmp_path / "data", sizes, column=column)
    splits = load(DataArguments(dataset_name=name, validation_samples=4, image_size=8, label_noise=0), 0)
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


def test_labels_without_names_are_counted(tmp_path, rates_file):
    name = write_images(tmp_path / "data", label=Value("int64"))
    file = rates_file(kind=RATES, classes=["x", "y", "z"])
    options = {"validation_samples": 4, "image_size": 8, "noise_rates": str(file), "noise_kind": "kind"}
    splits = load(DataArguments(dataset_name=name, **options), 0)
    assert splits.classes == 3
    ones = splits.true_labels == 1
    assert not splits.wrong[ones].any()  # class 1 is never taken for another
