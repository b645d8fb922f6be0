"""Whole runs of the translation recipe."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import translate
from common.timer import StepTimer
from tests.recipes.translate_pairs import PAIRS, TINY_MODEL, write_splits

CLASSES = {"fngd": "FNGD", "ngd": "FNGD", "adamw": "AdamW", "sgd": "SGD", "kfac": "KFAC"}


@pytest.fixture
def options(tmp_path):
    """Return the command line of a run of eight steps."""
    return [
        f"--dataset_name={write_splits(tmp_path / 'pairs')}",
        f"--output_dir={tmp_path / 'out'}",
        *TINY_MODEL,
        "--per_device_train_batch_size=16",
        "--num_train_epochs=2",
        "--learning_rate=0.01",
        "--disable_tqdm=true",
    ]


def translate_again(folder):
    """Translate the test pairs with the model and the tokenizer that load from a folder."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder)
    batch = tokenizer([pair["en"] for pair in PAIRS[:16]], return_tensors="pt", padding=True)
    return tokenizer.batch_decode(model.generate(**batch), skip_special_tokens=True)


@pytest.mark.parametrize("optimizer", CLASSES)
def test_a_run_leaves_a_model_that_loads_and_a_true_report(tmp_path, options, optimizer):
    report = translate.main([*options, f"--optimizer={optimizer}", "--predict_with_generate=true"])
    out = tmp_path / "out"

    results = json.loads((out / "all_results.json").read_text(encoding="utf-8"))
    assert results["optimizer"] == CLASSES[optimizer]
    assert results["optimizer_arguments"]["lr"] == 0.01
    assert results["predict_bleu"] == report["predict_bleu"]
    assert results["predict_bleu_signature"].startswith("nrefs:1|case:mixed")
    assert len(results["eval_bleu_counts"]) == 4
    assert {
        "eval_loss",
        "predict_loss",
        "train_loss",
        "train_runtime",
        "step_seconds_median",
        "step_seconds_mean",
    } <= set(results)
    assert (results["seed"], results["train_samples"]) == (42, 64)

    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"optimizer: **{CLASSES[optimizer]}**" in card
    assert "adamw_torch" not in card.lower()
    assert results["predict_bleu_signature"] in card
    assert (out / "learning_curve.png").read_bytes().startswith(b"\x89PNG")

    assert (out / "predictions.txt").read_text(encoding="utf-8").split("\n")[:-1] == translate_again(out)


def test_training_translates(tmp_path, options):
    argv = [*options, "--optimizer=adamw", "--num_train_epochs=40", "--save_strategy=no", "--dropout=0"]
    report = translate.main([*argv, "--d_model=32"])
    assert report["predict_bleu"] > 90  # the test pairs are among the training pairs
    assert report["predict_loss"] < 1.5


@pytest.mark.parametrize("optimizer", ["adamw", "fngd"])
def test_an_interrupted_run_ends_like_one_that_was_not(tmp_path, options, optimizer, monkeypatch, capsys):
    argv = [*options, f"--optimizer={optimizer}", "--logging_strategy=steps", "--logging_steps=1"]
    translate.main([*argv, f"--output_dir={tmp_path / 'whole'}"])

    on_step_end = StepTimer.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        on_step_end(self)
        if state.global_step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StepTimer, "on_step_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            translate.main(argv)
    report = translate.main(argv)

    assert f"Resuming from {tmp_path / 'out' / 'checkpoint-4'}" in capsys.readouterr().out
    assert "train_loss" not in report  # Trainer's would be of the rest alone
    losses = {}
    for name in ("whole", "out"):
        state = json.loads((tmp_path / name / "trainer_state.json").read_text(encoding="utf-8"))
        losses[name] = [event["loss"] for event in state["log_history"] if "loss" in event]
    assert len(losses["whole"]) == 8
    assert losses["out"] == losses["whole"]
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path, options, capsys):
    argv = [*options, "--optimizer=sgd", "--do_eval=false", "--do_predict=false", "--save_total_limit=2"]
    translate.main(argv)
    whole = load_file(tmp_path / "out" / "model.safetensors")
    state = tmp_path / "out" / "checkpoint-8" / "optimizer.pt"
    state.write_bytes(state.read_bytes()[:1000])
    translate.main(argv)
    assert f"Resuming from {tmp_path / 'out' / 'checkpoint-4'}" in capsys.readouterr().out
    resumed = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_overwriting_deletes_checkpoints_and_starts_anew(tmp_path, options):
    argv = [*options, "--optimizer=sgd", "--do_eval=false", "--do_predict=false"]
    translate.main(argv)
    (tmp_path / "out" / "checkpoint-8").rename(tmp_path / "out" / "checkpoint-99")  # an older, longer run's
    report = translate.main([*argv, "--overwrite_output_dir"])
    assert "train_loss" in report
    assert not (tmp_path / "out" / "checkpoint-99").exists()
    assert "predict_bleu" not in report
    assert not (tmp_path / "out" / "predictions.txt").exists()


@pytest.mark.parametrize(
    ("named", "message"), [("true", "holds no complete checkpoint"), ("nowhere", "'nowhere' is no folder")]
)
def test_resuming_from_nothing_is_an_error(options, named, message):
    with pytest.raises(ValueError, match=message):
        translate.main([*options, f"--resume_from_checkpoint={named}"])


def test_sharing_by_index_reaches_the_optimizer(options):
    report = translate.main([*options, "--sharing=index", "--strict=true", "--do_eval=false", "--do_predict=false"])
    assert report["optimizer_arguments"]["sharing"] == "index"


def test_the_best_epoch_is_scored_beside_the_last(tmp_path, options):
    argv = [*options, "--optimizer=adamw", "--metric_for_best_model=loss", "--save_total_limit=2"]
    argv += [
        "--greater_is_better=true",
        "--label_smoothing_factor=0",
    ]  # the largest loss, so that the first epoch has it
    report = translate.main(argv)
    out = tmp_path / "out"
    state = json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))
    losses = {event["step"]: event["eval_loss"] for event in state["log_history"] if "eval_loss" in event}
    best = max(losses, key=losses.get)
    assert best < max(losses)
    # Validation and test pairs are the same.
    assert report["best_predict_loss"] == pytest.approx(losses[best], rel=1e-5)
    assert report["predict_loss"] == pytest.approx(losses[max(losses)], rel=1e-5)
    saved, last = (load_file(out / folder / "model.safetensors") for folder in (".", f"checkpoint-{max(losses)}"))
    assert all(torch.equal(saved[key], last[key]) for key in last)


def test_accumulation_does_not_change_the_loss(tmp_path, options):
    argv = [*options, "--optimizer=sgd", "--dropout=0", "--max_steps=4", "--do_predict=false"]
    whole = translate.main([*argv, "--label_smoothing_factor=0"])
    parts = translate.main(
        [
            *argv,
            "--label_smoothing_factor=0",
            "--per_device_train_batch_size=4",
            "--gradient_accumulation_steps=4",
            f"--output_dir={tmp_path / 'parts'}",
        ]
    )
    assert parts["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-4)
    assert parts["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-4)


def test_two_processes_share_the_work(tmp_path, options):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    launch += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    argv = [*options, "--optimizer=adamw", "--use_cpu=true", "--max_predict_samples=15"]
    argv += ["--per_device_eval_batch_size=4"]  # 15 pairs in 4 batches: the last one is filled up, and cut again
    subprocess.run([*launch, translate.__file__, *argv], check=True, timeout=200, capture_output=True)
    out = tmp_path / "out"
    state = json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))
    assert (state["global_step"], state["epoch"]) == (4, 2.0)
    assert "batches of 32 pairs (2 process(es)" in (out / "README.md").read_text(encoding="utf-8")
    assert (out / "predictions.txt").read_text(encoding="utf-8").split("\n")[:-1] == translate_again(out)[:15]
