"""Options of the image recipe: defaults that depend on each other, and errors that name the fix."""

from __future__ import annotations

import pytest

from images.arguments import parse_arguments


def parse(tmp_path, *argv):
    return parse_arguments([f"--output_dir={tmp_path}", *argv])


def test_defaults_fit_the_model(tmp_path):
    data, model, loss, optimizer, training = parse(tmp_path)
    assert (data.label_noise, data.dataset_name, data.max_train_samples) == (0.4, None, 10_000)
    assert (model.model, model.hidden_size, model.num_layers, model.patch_size) == ("mlp", 512, 2, None)
    assert (loss.loss, loss.outliers, loss.trim) == ("cross_entropy", 0, 0.4)
    assert optimizer.optimizer == "fngd"
    assert (training.num_train_epochs, training.lr_scheduler_type.value) == (30, "cosine")
    assert not training.remove_unused_columns
    vit = parse(tmp_path, "--model=vit", "--num_layers=2")[1]
    assert (vit.hidden_size, vit.num_layers, vit.num_heads, vit.patch_size) == (96, 2, 4, 4)


def test_rates_replace_the_share(tmp_path):
    file = tmp_path / "rates.json"
    file.write_text("{}", encoding="utf-8")
    assert parse(tmp_path, f"--noise_rates={file}", "--noise_kind=worse")[0].label_noise is None
    with pytest.raises(ValueError, match="not both"):
        parse(tmp_path, f"--noise_rates={file}", "--noise_kind=worse", "--label_noise=0")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--label_noise=1.5"], r"label_noise is 1.5; it must lie in \[0, 1\]"),
        (["--unscaled=-0.1"], r"unscaled is -0.1; it must lie in \[0, 1\]"),
        (["--noise_kind=worse"], "--noise_rates .* together"),
        (["--noise_rates=nowhere.json", "--noise_kind=worse"], "'nowhere.json' is no file"),
        (["--max_train_samples=1000"], "leaves nothing to train on behind validation_samples=1000"),
        (["--image_size=0"], "image_size is 0"),
        (["--patch_size=4"], "mlp has no use for --num_heads and --patch_size"),
        (["--model=vit", "--patch_size=5"], "patch_size=5 does not divide image_size=16"),
        (["--model=vit", "--num_heads=5"], "num_heads=5 does not divide hidden_size=96"),
        (["--num_layers=0"], "num_layers is 0"),
        (["--dropout=1"], "dropout is 1.0"),
        (["--gce_q=0.5"], "cross_entropy has no use for --gce_q, which --loss gce takes"),
        (["--loss=gce", "--trim=0.5"], "gce has no use for --trim, which --loss small_loss takes"),
        (["--loss=gce", "--gce_q=0"], r"gce_q is 0.0; it must lie in \(0, 1\]"),
        (["--loss=gce", "--label_smoothing_factor=0.1"], "set --label_smoothing_factor 0"),
        (["--loss=small_loss", "--trim=1"], "trim is 1.0"),
        (["--loss=small_loss", "--trim_epochs=-1"], "trim_epochs is -1.0"),
        (["--outlier_scale=10"], "--outlier_scale needs --outliers"),
        (["--outliers=-1"], "outliers is -1"),
        (["--folds=1"], "folds is 1; it must be 0, or at least 2"),
        (["--remove_unused_columns=true"], "Leave --remove_unused_columns off"),
        (["--push_to_hub=true"], "no --push_to_hub"),
        (["--optim=sgd"], "Set --optimizer instead of --optim sgd"),
        (["--label_nois=0.1"], "did you mean label_noise"),
    ],
)
def test_bad_options_name_the_fix(tmp_path, argv, message):
    with pytest.raises(ValueError, match=message):
        parse(tmp_path, *argv)
