"""Whole runs of the image recipe, on synthetic images."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import image_classification
from common.timer import StepTimer
from images.arguments import ModelArguments
from images.data import Columns
from images.folds import out_of_sample_logits
from images.models import Perceptron, build_model

CLASSES = {"fngd": "FNGD", "adamw": "AdamW", "kfac": "KFAC"}
MODELS = {
    "mlp": ["--hidden_size=16"],
    "vit": ["--model=vit", "--hidden_size=16", "--num_layers=1", "--num_heads=2"],
}


@pytest.fixture
def options(tmp_path):
    """Return the command line of a run of eight steps."""
    return [
        f"--output_dir={tmp_path / 'out'}",
        "--max_train_samples=160",
        "--validation_samples=32",
        "--max_test_samples=40",
        "--image_size=8",
        "--per_device_train_batch_size=32",
        "--num_train_epochs=2",
        "--learning_rate=0.01",
        "--disable_tqdm=true",
    ]


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", CLASSES)
def test_a_run_leaves_a_report_and_curves(tmp_path, options, optimizer, model):
    report = image_classification.main([*options, *MODELS[model], f"--optimizer={optimizer}"])
    results = read(tmp_path / "out", "all_results.json")
    assert results["optimizer"] == CLASSES[optimizer]
    assert (results["model"], results["train_samples"], results["seed"]) == (model, 128, 42)
    shares = ["test_accuracy", "selected_test_accuracy", "best_test_accuracy", "train_accuracy", "wrong_fitted"]
    shares += ["eval_noisy_accuracy", "loss_auc", "loss_precision", "mean_loss_auc", "mean_loss_precision"]
    assert all(0 <= results[name] <= 1 for name in shares)
    assert all(results[name] > 0 for name in ("train_loss", "test_loss", "eval_noisy_loss", "parameters"))
    assert {"step_seconds_mean", "step_seconds_median", "largest_rise"} <= set(results)
    assert results["test_accuracy"] == report["test_accuracy"]

    history = read(tmp_path / "out", "trainer_state.json")["log_history"]
    tests, noisy = (
        [e[f"eval_{name}_accuracy"] for e in history if f"eval_{name}_loss" in e] for name in ("test", "noisy")
    )
    assert len(tests) == len(noisy) == 2
    # What is reported of the end is what the last epoch's evaluation found.
    assert results["test_accuracy"] == tests[-1]
    assert results["eval_noisy_accuracy"] == noisy[-1]
    assert results["best_test_accuracy"] == max(tests)
    assert results["selected_test_accuracy"] == tests[noisy.index(max(noisy))]
    record = torch.load(tmp_path / "out" / "sample_losses.pt", weights_only=True)
    assert record["counts"].tolist() == [2] * 128
    assert len(record["batches"]) == 8


@pytest.mark.parametrize("optimizer", ["fngd", "adamw"])
def test_folds_find_wrong_labels_that_a_model_has_memorized(options, optimizer):
    sizes = ["--max_train_samples=832", "--hidden_size=64", "--num_train_epochs=10", "--eval_strategy=no"]
    argv = [*options, *sizes, f"--optimizer={optimizer}", "--label_noise=0.2"]
    plain, folded = image_classification.main(argv), image_classification.main([*argv, "--folds=3"])
    assert "self_confidence_auc" not in plain
    assert folded["test_accuracy"] == plain["test_accuracy"]  # of the model that saw all
    assert folded["self_confidence_auc"] > max(0.6, folded["loss_auc"])


def test_dropping_the_last_batch_drops_no_row_of_an_evaluation(options):
    batches = ["--per_device_eval_batch_size=25", "--per_device_train_batch_size=60"]
    argv = [*options, *batches, "--optimizer=adamw", "--num_train_epochs=0.01", "--folds=3"]  # one step
    whole, dropped = (image_classification.main([*argv, f"--dataloader_drop_last={drop}"]) for drop in (False, True))
    names = ["test_accuracy", "eval_noisy_accuracy", "train_accuracy", "loss_auc"]
    assert {name: dropped[name] for name in names} == {name: whole[name] for name in names}


def test_rows_keep_their_place_in_the_folds():
    class Fold:
        """Predicts each row's own number, if it was not trained on it."""

        def __init__(self, part):
            self.part = part

        def train(self):
            pass

        def predict(self, split, metric_key_prefix):
            rows = split.columns["labels"]
            assert not torch.isin(rows, self.part.columns["labels"]).any()
            metrics = dict.fromkeys([f"{metric_key_prefix}_loss", f"{metric_key_prefix}_accuracy"], 0.0)
            return SimpleNamespace(predictions=rows[:, None].double().numpy(), metrics=metrics)

    assert out_of_sample_logits(Columns(labels=torch.arange(11)), 3, Fold).flatten().tolist() == list(range(11))


def test_what_can_be_memorized_is(options):
    argv = [*options, "--optimizer=adamw", "--hidden_size=128", "--num_train_epochs=30", "--eval_strategy=no"]
    report = image_classification.main(argv)
    assert report["train_accuracy"] > 0.99
    assert report["wrong_fitted"] > 0.99
    assert 0.2 < report["wrong_labels"] < 0.5
    assert report["wrong_corrected"] < 0.01
    assert "selected_test_accuracy" not in report  # no epoch was evaluated


@pytest.mark.parametrize(
    "loss",
    [
        ["--loss=gce"],
        ["--loss=small_loss", "--trim_epochs=0"],
        ["--label_smoothing_factor=0.4"],
        ["--outliers=1", "--outlier_scale=1e4"],
    ],
    ids=lambda loss: loss[0][2:],
)
def test_losses_train_and_are_evaluated_as_cross_entropy(tmp_path, options, loss):
    argv = [*options, *MODELS["mlp"], "--optimizer=sgd", "--learning_rate=1e-9", "--eval_strategy=no"]
    plain = image_classification.main(argv)
    other = image_classification.main([*argv, *loss])
    assert other["test_loss"] == pytest.approx(plain["test_loss"], rel=1e-3)
    assert other["train_loss"] != pytest.approx(plain["train_loss"], rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "fngd"])
def test_accumulation_does_not_change_the_training(tmp_path, options, optimizer):
    # FNGD weights the samples of a micro-batch: with w = 1 alone it is the same.
    sharing = ["--sharing=uniform"] if optimizer == "fngd" else []
    argv = [*options, *MODELS["mlp"], f"--optimizer={optimizer}", *sharing, "--update=adam"][: None if sharing else -1]
    whole = image_classification.main(argv)
    parts = image_classification.main(
        [*argv, "--per_device_train_batch_size=8", "--gradient_accumulation_steps=4", "--overwrite_output_dir"]
    )
    assert parts["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-4)
    assert parts["test_loss"] == pytest.approx(whole["test_loss"], rel=1e-3)


def test_sharing_by_index_reports_how_well_weights_find_wrong_labels(options):
    argv = [*options, *MODELS["mlp"], "--sharing=index", "--refresh=2", "--damping=0.01", "--strict=true"]
    report = image_classification.main(argv)
    assert report["optimizer_arguments"]["sharing"] == "index"
    assert 0 < report["weight_auc"] < 1
    assert 0 < report["weight_precision"] < 1


@pytest.mark.parametrize("optimizer", ["adamw", "fngd"])
def test_an_interrupted_run_ends_like_one_that_was_not(tmp_path, options, optimizer, monkeypatch, capsys):
    argv = [*options, *MODELS["mlp"], f"--optimizer={optimizer}", "--save_strategy=epoch", "--outliers=1"]
    whole = image_classification.main([*argv, f"--output_dir={tmp_path / 'whole'}"])

    on_step_end = StepTimer.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        on_step_end(self)
        if state.global_step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StepTimer, "on_step_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            image_classification.main(argv)
    resumed = image_classification.main(argv)

    assert f"Resuming from {tmp_path / 'out' / 'checkpoint-4'}" in capsys.readouterr().out
    assert "train_loss" not in resumed  # Trainer's would be of the rest alone
    measured = ("test_", "eval_", "selected_", "best_", "loss_", "mean_loss_", "wrong_", "largest_")
    figures = {name for name in whole if name.startswith(measured)}
    assert {name: resumed[name] for name in figures} == {name: whole[name] for name in figures}
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_the_perceptron_starts_as_torch_makes_it_and_loads_again(tmp_path):
    torch.manual_seed(0)
    model = build_model(ModelArguments(hidden_size=64, num_layers=3, dropout=0.1), image_size=4, classes=7)
    shapes = [tuple(p.shape) for p in model.parameters() if p.dim() == 2]
    assert shapes == [(64, 48), (64, 64), (64, 64), (7, 64)]
    for p in model.parameters():
        if p.dim() == 2:
            assert p.abs().max().item() == pytest.approx(p.shape[1] ** -0.5, rel=0.02)
    model.save_pretrained(tmp_path)
    again = Perceptron.from_pretrained(tmp_path)
    images, labels = torch.randn(5, 3, 4, 4), torch.tensor([0, 1, 2, 3, 6])
    with torch.no_grad():
        found, expected = again(images, labels), model.eval()(images)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, torch.nn.functional.cross_entropy(expected.logits, labels))
