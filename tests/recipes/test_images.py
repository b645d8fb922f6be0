"""Whole runs of the image recipe, on synthetic images."""

import pytest
import torch

import image_classification
from hf_fngd import FNGD
from hf_fngd.engine.reasons import CLIPPED_BEHIND
from images.arguments import ModelArguments
from images.models import Perceptron, build_model
from tests.recipes.running import in_parts, interrupted, read

CLASSES = {"fngd": "FNGD", "adamw": "AdamW", "kfac": "KFAC"}
MODELS = {
    "mlp": ["--hidden_size=16"],
    "vit": ["--model=vit", "--hidden_size=16", "--num_layers=1", "--num_heads=2"],
    "resnet": ["--model=resnet", "--hidden_size=4", "--num_layers=8", "--augment=true"],
    "vgg": ["--model=vgg", "--hidden_size=4"],
    "convnext": ["--model=convnext", "--hidden_size=8", "--image_size=16"],
}


@pytest.fixture
def options(tmp_path):
    """Return the command line of a run of eight steps."""
    sizes = "--max_train_samples=160 --validation_samples=32 --max_test_samples=40 --image_size=8"
    common = "--per_device_train_batch_size=32 --num_train_epochs=2 --learning_rate=0.01 --disable_tqdm=true"
    return [f"--output_dir={tmp_path / 'out'}", *sizes.split(), *common.split()]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", CLASSES)
def test_a_run_leaves_a_report_and_curves(tmp_path, options, optimizer, model):
    report = image_classification.main([*options, *MODELS[model], f"--optimizer={optimizer}"])
    results = read(tmp_path / "out", "all_results.json")
    assert results["optimizer"] == CLASSES[optimizer]
    assert (results["model"], results["train_samples"], results["seed"]) == (model, 128, 42)
    shares = ["test_accuracy", "selected_test_accuracy", "best_test_accuracy", "train_accuracy"]
    shares += ["eval_validation_accuracy", "selected_validation_accuracy"]
    assert all(0 <= results[name] <= 1 for name in shares)
    assert all(results[name] > 0 for name in ("train_loss", "test_loss", "eval_validation_loss", "parameters"))
    assert {"step_seconds_mean", "step_seconds_median", "largest_rise"} <= set(results)
    assert results["test_accuracy"] == report["test_accuracy"]

    history = read(tmp_path / "out", "trainer_state.json")["log_history"]
    tests, validation = (
        [e[f"eval_{name}_accuracy"] for e in history if f"eval_{name}_loss" in e] for name in ("test", "validation")
    )
    assert len(tests) == len(validation) == 2
    # What is reported of the end is what the last epoch's evaluation found.
    assert results["test_accuracy"] == tests[-1]
    assert results["eval_validation_accuracy"] == validation[-1]
    assert results["best_test_accuracy"] == max(tests)
    assert results["selected_test_accuracy"] == tests[validation.index(max(validation))]


def test_dropping_the_last_batch_drops_no_row_of_an_evaluation(options):
    batches = ["--per_device_eval_batch_size=25", "--per_device_train_batch_size=60"]
    argv = [*options, *batches, "--optimizer=adamw", "--num_train_epochs=0.01"]  # one step
    anew = "--overwrite_output_dir=true"
    whole, dropped = (
        image_classification.main([*argv, f"--dataloader_drop_last={drop}", anew]) for drop in (False, True)
    )
    names = ["test_accuracy", "eval_validation_accuracy", "train_accuracy"]
    assert {name: dropped[name] for name in names} == {name: whole[name] for name in names}


def test_what_is_not_asked_for_is_not_scored(options):
    report = image_classification.main([*options, "--optimizer=adamw", "--do_eval=false"])
    assert "test_accuracy" in report
    assert not {"eval_validation_accuracy", "train_accuracy"} & set(report)
    report = image_classification.main([*options, "--optimizer=adamw", "--do_predict=false"])
    assert {"eval_validation_accuracy", "train_accuracy"} <= set(report)
    assert "test_accuracy" not in report
    with pytest.raises(ValueError, match="holds another training: optimizer was 'adamw' and is 'sgd'"):
        image_classification.main([*options, "--optimizer=sgd"])


def test_what_can_be_memorized_is(options):
    argv = [*options, "--optimizer=adamw", "--hidden_size=128", "--num_train_epochs=30", "--eval_strategy=no"]
    report = image_classification.main(argv)
    assert report["train_accuracy"] > 0.99
    assert "selected_test_accuracy" not in report  # no epoch was evaluated


@pytest.mark.parametrize(
    "loss", [["--label_smoothing_factor=0.4"], ["--outliers=1", "--outlier_scale=1e4"]], ids=lambda loss: loss[0][2:]
)
def test_losses_train_and_are_evaluated_as_cross_entropy(options, loss):
    argv = [*options, *MODELS["mlp"], "--optimizer=sgd", "--learning_rate=1e-9", "--eval_strategy=no"]
    plain = image_classification.main(argv)
    other = image_classification.main([*argv, *loss, "--overwrite_output_dir=true"])
    assert other["test_loss"] == pytest.approx(plain["test_loss"], rel=1e-3)
    assert other["train_loss"] != pytest.approx(plain["train_loss"], rel=1e-5)


# FNGD weighs the samples of a micro-batch: with w = 1 alone it is the same.
@pytest.mark.parametrize("optimizer", [["adamw"], ["fngd", "--sharing=uniform", "--update=adam"]], ids=lambda o: o[0])
def test_accumulation_does_not_change_the_training(tmp_path, options, optimizer):
    argv = [*options, *MODELS["mlp"], "--optimizer", *optimizer]
    whole, parts = in_parts(image_classification.main, argv, tmp_path, size=8, parts=4)
    assert parts["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-4)
    assert parts["test_loss"] == pytest.approx(whole["test_loss"], rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "fngd"])
def test_an_interrupted_run_ends_like_one_that_was_not(tmp_path, options, optimizer, capsys):
    argv = [*options, *MODELS["mlp"], f"--optimizer={optimizer}", "--save_strategy=epoch", "--outliers=1"]
    argv += ["--augment=true", "--lr_scheduler_type=constant", "--decay_at", "0.25", "0.7"]
    whole, resumed = interrupted(image_classification.main, argv, tmp_path)
    assert f"Resuming from {tmp_path / 'out' / 'checkpoint-4'}" in capsys.readouterr().out
    assert "largest_rise" in whole
    assert "largest_rise" not in resumed  # it would be of the rest alone
    figures = {name for name in whole if name.startswith(("test_", "eval_", "selected_", "best_", "train_accuracy"))}
    assert {name: resumed[name] for name in figures} == {name: whole[name] for name in figures}


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


def test_the_learning_rate_falls_behind_shares_of_the_steps(tmp_path, options):
    argv = [
        *options,
        *MODELS["mlp"],
        "--lr_scheduler_type=constant_with_warmup",
        "--warmup_steps=2",
        "--logging_steps=1",
    ]
    image_classification.main([*argv, "--logging_strategy=steps", "--decay_at", "0.5", "0.75"])
    history = read(tmp_path / "out", "trainer_state.json")["log_history"]
    rates = [event["learning_rate"] for event in history if "learning_rate" in event]
    assert rates == pytest.approx([0, 0.005, 0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({"model": "resnet"}, 269_722),  # 0.27 million in Table 6 of He et al. (2016)
        ({"model": "resnet", "num_layers": 32}, 464_154),  # 0.46 million there
        ({"model": "resnet", "num_layers": 18}, 11_173_962),
        ({"model": "vgg"}, 9_228_362),
    ],
)
def test_convolutional_networks_are_the_known_ones(options, parameters):
    model = build_model(ModelArguments(**options), image_size=32, classes=10)
    assert model.num_parameters() == parameters
    widths = {module.weight.std().item() * (module.out_channels * 9 / 2) ** 0.5 for module in convolutions(model)}
    assert min(widths) > 0.9  # He et al. (2015)
    assert max(widths) < 1.1


def convolutions(model):
    """The 3 x 3 ones."""
    return [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]


@pytest.mark.parametrize("model", ["resnet", "vgg"])
@pytest.mark.parametrize("side", [8, 9])
def test_convolutional_networks_load_again_and_are_weighed(tmp_path, model, side):
    torch.manual_seed(0)
    network = build_model(ModelArguments(model=model, hidden_size=4), image_size=side, classes=3)
    network.save_pretrained(tmp_path)
    again = type(network).from_pretrained(tmp_path)
    images, labels = torch.randn(5, 3, side, side), torch.tensor([0, 1, 2, 2, 0])
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(images).logits, network.eval()(images).logits)
    optimizer = FNGD(network.train())
    network(images, labels).loss.backward()
    optimizer.step()
    report = optimizer.coverage()  # before a BatchNorm they do not clip; the update rule moves them all the same
    assert not report.missed
    stepped = {
        name for name, reason in report.plain.items() if reason == f"{CLIPPED_BEHIND}, and the update rule steps it"
    }
    names = {name.removesuffix(".weight") for name in (*report.preconditioned, *stepped)}
    assert names >= {name for name, module in network.named_modules() if isinstance(module, torch.nn.Conv2d)}


def test_a_batch_of_one_image_is_told_before_training(options):
    argv = [*options, "--model=vgg", "--hidden_size=4", "--validation_samples=31"]  # 129 images in batches of 32
    with pytest.raises(ValueError, match="last batch of 129 training images has one"):
        image_classification.main(argv)
    image_classification.main([*argv, "--dataloader_drop_last=true", "--num_train_epochs=1"])
