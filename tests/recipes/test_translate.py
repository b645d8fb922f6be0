"""Whole runs of the translation recipe."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import translate
from common.arguments import DatasetArguments, TextTrainingArguments, parse
from common.run import check_same, training_options
from hf_fngd import FNGDConfig
from tests.recipes.running import assert_best_is_scored, have_equal_weights, in_parts, interrupted, read, short
from tests.recipes.translate_pairs import PAIRS, TINY_MODEL

CLASSES = {"fngd": "FNGD", "ngd": "FNGD", "adamw": "AdamW", "sgd": "SGD", "kfac": "KFAC"}


@pytest.fixture
def options(tmp_path):
    """Return the command line of a run of eight steps."""
    return short(tmp_path, *TINY_MODEL, "--num_train_epochs=2")


def translate_again(folder):
    """Translate the test pairs with the model and the tokenizer that load from a folder."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder)
    batch = tokenizer([pair["en"] for pair in PAIRS[:16]], return_tensors="pt", padding=True)
    return tokenizer.batch_decode(model.generate(**batch), skip_special_tokens=True)


@pytest.mark.parametrize("optimizer", CLASSES)
def test_a_run_leaves_a_model_that_loads_and_a_true_report(tmp_path, options, optimizer):
    report = translate.main([*options, f"--optimizer={optimizer}", "--predict_with_generate=true"])
    out = tmp_path / "out"

    results = read(out, "all_results.json")
    assert results["optimizer"] == CLASSES[optimizer]
    assert results["optimizer_arguments"]["lr"] == 0.01
    assert results["predict_bleu"] == report["predict_bleu"]
    assert results["predict_bleu_signature"].startswith("nrefs:1|case:mixed")
    assert results["predict_bleu_lc_signature"].startswith("nrefs:1|case:lc")
    assert len(results["eval_bleu_counts"]) == 4
    times = {"train_runtime", "step_seconds_median", "step_seconds_mean"}
    assert {"eval_loss", "predict_loss", "train_loss", *times} <= set(results)
    assert (results["seed"], results["train_samples"]) == (42, 64)

    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"optimizer: **{CLASSES[optimizer]}**" in card
    assert "adamw_torch" not in card.lower()
    assert results["predict_bleu_signature"] in card
    assert results["predict_bleu_lc_signature"] in card
    assert (out / "learning_curve.png").read_bytes().startswith(b"\x89PNG")

    assert (out / "predictions.txt").read_text(encoding="utf-8").split("\n")[:-1] == translate_again(out)


def test_training_translates(tmp_path, options):
    argv = [*options, "--optimizer=adamw", "--num_train_epochs=40", "--save_strategy=no", "--dropout=0"]
    report = translate.main([*argv, "--d_model=32"])
    assert report["predict_bleu"] > 90  # the test pairs are among the training pairs
    assert report["predict_loss"] < 1.5


@pytest.mark.parametrize("optimizer", ["adamw", "fngd"])
def test_an_interrupted_run_ends_like_one_that_was_not(tmp_path, options, optimizer, capsys):
    argv = [*options, f"--optimizer={optimizer}", "--logging_strategy=steps", "--logging_steps=1"]
    interrupted(translate.main, argv, tmp_path)
    assert f"Resuming from {tmp_path / 'out' / 'checkpoint-4'}" in capsys.readouterr().out
    histories = [read(tmp_path / name, "trainer_state.json")["log_history"] for name in ("whole", "out")]
    whole, resumed = ([event["loss"] for event in history if "loss" in event] for history in histories)
    assert len(whole) == 8
    assert resumed == whole


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path, options, capsys):
    argv = [*options, "--optimizer=sgd", "--do_eval=false", "--do_predict=false", "--save_total_limit=2"]
    translate.main(argv)
    (tmp_path / "out" / "model.safetensors").rename(tmp_path / "model.safetensors")
    state = tmp_path / "out" / "checkpoint-8" / "optimizer.pt"
    state.write_bytes(state.read_bytes()[:1000])
    translate.main(argv)
    assert f"Resuming from {tmp_path / 'out' / 'checkpoint-4'}" in capsys.readouterr().out
    assert have_equal_weights(tmp_path, tmp_path / "out")


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


def test_the_checkpoints_of_another_training_are_not_resumed(tmp_path, options):
    translate.main([*options, "--num_train_epochs=1"])
    for more, message in (
        (["--optimizer=adamw"], "optimizer was 'fngd' and is 'adamw'"),
        (["--learning_rate=0.02", "--dropout=0.3"], "dropout was 0.1 and is 0.3, learning_rate was 0.01 and is 0.02"),
    ):
        with pytest.raises(ValueError, match=f"holds another training: {message}.*--overwrite_outp"):
            translate.main([*options, *more])
    longer = translate.main([*options, "--num_train_epochs=2", "--num_beams=2", "--max_predict_samples=3"])
    assert read(tmp_path / "out", "trainer_state.json")["global_step"] == 8
    assert longer["num_beams"] == 2
    anew = translate.main([*options, "--optimizer=adamw", "--overwrite_output_dir=true", "--num_train_epochs=1"])
    assert anew["optimizer"] == "AdamW"
    assert read(tmp_path / "out", "options.json")["optimizer"] == "adamw"


@pytest.mark.parametrize(("before", "after"), [("fngd", "adamw"), ("adamw", "sgd")], ids=["from FNGD", "to SGD"])
def test_the_results_of_another_training_are_not_replaced(tmp_path, options, before, after):
    argv = [*options, "--num_train_epochs=1", "--save_strategy=no"]
    translate.main([*argv, f"--optimizer={before}"])
    kept = (tmp_path / "out" / "all_results.json").read_bytes()
    with pytest.raises(ValueError, match=f"holds another training: optimizer was '{before}' and is '{after}'"):
        translate.main([*argv, f"--optimizer={after}"])
    assert (tmp_path / "out" / "all_results.json").read_bytes() == kept
    translate.main([*argv, f"--optimizer={before}"])  # the same once more
    report = translate.main([*argv, f"--optimizer={after}", "--overwrite_output_dir=true"])
    assert report["optimizer"] == {"sgd": "SGD", "adamw": "AdamW"}[after]


def test_the_checkpoints_of_a_changed_configuration_are_not_resumed(tmp_path, options):
    config = FNGDConfig()
    argv = [*options, "--num_train_epochs=1", f"--fngd_config={tmp_path / 'config'}"]
    config.save_pretrained(tmp_path / "config")
    translate.main(argv)
    translate.main(argv)
    FNGDConfig(momentum=0.5).save_pretrained(tmp_path / "config")
    with pytest.raises(ValueError, match="holds another training: fngd was "):
        translate.main(argv)


def test_a_run_on_another_number_of_processes_is_another_one(tmp_path):
    parsed = parse([DatasetArguments, TextTrainingArguments], ["--output_dir=out", "--use_cpu=true"])
    options, file = training_options(parsed), tmp_path / "options.json"
    file.write_text(json.dumps(options), encoding="utf-8")
    check_same(file, options)
    file.write_text(json.dumps(options | {"processes": 2}), encoding="utf-8")
    with pytest.raises(ValueError, match="holds another training: processes was 2 and is 1"):
        check_same(file, options)


def test_without_scores_at_the_end_there_are_none(options):
    report = translate.main([*options, "--do_eval=false", "--do_predict=false", "--num_train_epochs=1"])
    assert not [name for name in report if name.startswith(("eval_", "predict_"))]


def test_the_best_epoch_is_scored_beside_the_last(tmp_path, options):
    argv = [*options, "--optimizer=adamw", "--label_smoothing_factor=0"]
    assert_best_is_scored(translate.main, argv, tmp_path / "out", rel=1e-5)


def test_the_model_is_the_mean_of_its_last_checkpoints(tmp_path, options):
    argv = [*options, "--num_train_epochs=3", "--save_total_limit=2", "--average_checkpoints=2"]
    report = translate.main(argv)
    out = tmp_path / "out"
    folders = [out / f"checkpoint-{step}" for step in (8, 12)]
    second, third, mean = (load_file(folder / "model.safetensors") for folder in (*folders, out))
    assert report["averaged_checkpoints"] == 2
    assert any(not torch.equal(second[name], third[name]) for name in mean)
    for name, averaged in mean.items():
        assert torch.allclose(averaged, (second[name] + third[name]) / 2, rtol=1e-6, atol=1e-8)
    assert "the mean of the last 2 checkpoints" in (out / "README.md").read_text(encoding="utf-8")
    assert (out / "predictions.txt").read_text(encoding="utf-8").split("\n")[:-1] == translate_again(out)
    again = translate.main(argv)  # resumes behind the last step
    assert again["averaged_checkpoints"] == 2
    assert again["predict_loss"] == report["predict_loss"]


def test_fewer_checkpoints_than_are_to_be_averaged_are_all_of_them(options):
    report = translate.main([*options, "--num_train_epochs=1", "--save_total_limit=5", "--average_checkpoints=5"])
    assert report["averaged_checkpoints"] == 1


def test_what_is_no_complete_checkpoint_is_not_averaged(tmp_path, options):
    argv = [*options, "--num_train_epochs=2", "--save_total_limit=9", "--average_checkpoints=9"]
    translate.main(argv)
    out = tmp_path / "out"
    mean = load_file(out / "model.safetensors")
    for name in ("checkpoint-best", "checkpoint-8-before", "checkpoint-7"):
        (out / name).mkdir()
    assert translate.main(argv)["averaged_checkpoints"] == 2
    again = load_file(out / "model.safetensors")
    assert all(torch.equal(again[name], mean[name]) for name in mean)


def test_test_sets_that_would_not_be_scored_are_refused(options):
    with pytest.raises(ValueError, match="scored where --do_predict is on"):
        translate.main([*options, "--test_sets", "more.csv", "--do_predict=false"])


def test_more_test_sets_are_scored_each(tmp_path, options):
    other = tmp_path / "two-pairs.jsonl"
    lines = (tmp_path / "pairs" / "test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    other.write_text("".join(lines[:2]), encoding="utf-8")
    same = tmp_path / "same.jsonl"
    same.write_text("".join(lines), encoding="utf-8")
    report = translate.main([*options, "--predict_with_generate=true", "--test_sets", str(other), str(same)])
    out = tmp_path / "out"
    assert report["test_sets"] == ["two_pairs", "same"]
    assert report["predict_same_bleu"] == report["predict_bleu"]
    assert report["predict_same_loss"] == pytest.approx(report["predict_loss"])
    assert (out / "predictions_two_pairs.txt").read_text(encoding="utf-8").split("\n")[:-1] == translate_again(out)[:2]
    assert "| test set `two_pairs` |" in (out / "README.md").read_text(encoding="utf-8")


def test_accumulation_does_not_change_the_loss(tmp_path, options):
    argv = [*options, "--optimizer=sgd", "--dropout=0", "--max_steps=4", "--do_predict=false"]
    whole, parts = in_parts(translate.main, [*argv, "--label_smoothing_factor=0"], tmp_path, size=4, parts=4)
    for name in ("train_loss", "eval_loss"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-4)


def test_two_processes_share_the_work(tmp_path, options):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    launch += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    argv = [*options, "--optimizer=adamw", "--use_cpu=true", "--max_predict_samples=15"]
    argv += ["--per_device_eval_batch_size=4"]  # 15 pairs in 4 batches: the last one is filled up, and cut again
    subprocess.run([*launch, translate.__file__, *argv], check=True, timeout=200, capture_output=True)
    out = tmp_path / "out"
    state = read(out, "trainer_state.json")
    assert (state["global_step"], state["epoch"]) == (4, 2.0)
    assert "batches of 32 rows (2 process(es)" in (out / "README.md").read_text(encoding="utf-8")
    assert (out / "predictions.txt").read_text(encoding="utf-8").split("\n")[:-1] == translate_again(out)[:15]
