"""The language modeling recipe: its loss, its perplexity, whole runs."""

import itertools
import math
import statistics

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, EvalPrediction
from transformers.pytorch_utils import Conv1D

import corpus
import language_modeling
from language_modeling import ModelArguments, build_model, perplexity, token_losses
from tests.recipes.running import assert_best_is_scored, assert_matrices, in_parts, interrupted, read, short
from tests.recipes.translate_pairs import PAIRS
from text.tokenizer import EOS, train_tokenizer

TINY = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 300}
TEXTS = [pair["en"] for pair in PAIRS]


@pytest.fixture
def options(tmp_path):
    """Return the command line of a run of four steps."""
    sizes = (f"--{name}={value}" for name, value in TINY.items())
    return short(tmp_path, *sizes, "--num_train_epochs=1", "--save_strategy=no")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300, f"{EOS} $A")


def sentence_losses(model, tokenizer, texts):
    """Return the losses of all tokens of each text, its end among them, computed one text at a time."""
    losses = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]])
        assert ids[0, 0] == tokenizer.bos_token_id
        with torch.no_grad():
            log_probs = model(ids).logits.log_softmax(-1)
        losses.append([-log_probs[0, t, ids[0, t + 1]].item() for t in range(ids.shape[1] - 1)])
    return losses


def loss_of_a_token(model, tokenizer, texts):
    """Return the mean over the tokens of all texts."""
    return statistics.mean(itertools.chain(*sentence_losses(model, tokenizer, texts)))


def test_losses_of_padded_sentences_are_those_of_the_sentences_alone(tokenizer):
    model = build_model(tokenizer, ModelArguments(**TINY)).eval()
    rows = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in TEXTS[:9:3]]
    longest = max(map(len, rows))
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    labels = torch.tensor([row + [-100] * (longest + 2 - len(row)) for row in rows])  # as several processes pad them
    with torch.no_grad():
        found = token_losses(model(**batch).logits, labels)
    expected = sentence_losses(model, tokenizer, TEXTS[:9:3])
    torch.testing.assert_close(found, torch.tensor([[sum(losses), len(losses)] for losses in expected]))
    mean = sum(map(sum, expected)) / sum(map(len, expected))
    assert perplexity(EvalPrediction(found.numpy(), None))["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)


def test_a_diverged_model_has_an_infinite_perplexity():
    assert perplexity(EvalPrediction(torch.tensor([[9e6, 3.0]]).numpy(), None)) == {"perplexity": math.inf}


@pytest.mark.parametrize("optimizer", ["fngd", "sgd"])
def test_a_run_leaves_a_model_that_loads_and_a_true_report(tmp_path, options, optimizer):
    report = language_modeling.main([*options, f"--optimizer={optimizer}"])
    out = tmp_path / "out"
    results = read(out, "all_results.json")
    assert results["optimizer"] == {"fngd": "FNGD", "sgd": "SGD"}[optimizer]
    assert results["optimizer_arguments"]["lr"] == 0.01
    assert {"step_seconds_mean", "train_loss", "eval_loss", "seed"} <= set(results)
    assert f"optimizer: **{results['optimizer']}**" in (out / "README.md").read_text(encoding="utf-8")

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert results["parameters"] == model.num_parameters()
    mean = loss_of_a_token(model, tokenizer, TEXTS[:16])
    assert results["predict_loss"] == pytest.approx(mean, rel=1e-5)
    assert results["predict_perplexity"] == report["predict_perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)


def test_the_loss_is_the_mean_over_the_tokens_of_a_whole_batch(tmp_path, options):
    argv = [*options, "--optimizer=sgd", "--dropout=0", "--do_predict=false", "--per_device_train_batch_size=64"]
    # One batch of all sentences, before any update: its loss is that of the untrained model, first tokens not counted.
    whole = language_modeling.main([*argv, "--learning_rate=0"])
    model, tokenizer = (cls.from_pretrained(tmp_path / "out") for cls in (AutoModelForCausalLM, AutoTokenizer))
    assert whole["train_loss"] == pytest.approx(loss_of_a_token(model, tokenizer, TEXTS), rel=1e-4)

    argv += ["--num_train_epochs=3", "--learning_rate=0.3"]
    whole, parts = in_parts(language_modeling.main, argv, tmp_path, size=8, parts=8)
    for name in ("train_loss", "eval_loss"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-4)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("w", "p"))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-3, atol=1e-5)


def test_an_interrupted_run_ends_like_one_that_was_not(tmp_path, options):
    argv = [*options, "--save_strategy=epoch", "--num_train_epochs=2", "--do_eval=false", "--do_predict=false"]
    interrupted(language_modeling.main, argv, tmp_path)


def test_the_best_epoch_is_scored_beside_the_last(tmp_path, options):
    argv = [*options, "--num_train_epochs=2", "--save_strategy=epoch"]
    assert_best_is_scored(language_modeling.main, argv, tmp_path / "out", rel=1e-6)


def test_the_embedded_corpus_is_the_default(tmp_path, options, monkeypatch):
    load = corpus.load
    monkeypatch.setattr(corpus, "load", lambda: load(64, 16, 16))
    report = language_modeling.main([*options[1:], "--text_column=de", "--do_predict=false"])
    assert (report["dataset_name"], report["text_column"], report["train_samples"]) == (None, "de", 64)
    assert "predict_loss" not in report


def test_fngd_and_the_baselines_take_the_layers_of_the_blocks(tokenizer):
    model = build_model(tokenizer, ModelArguments(**TINY))
    blocks = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    batch = tokenizer(TEXTS[:4], padding=True, return_tensors="pt")
    assert_matrices(model, blocks, **batch, labels=batch["input_ids"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--text_column=fr"], r"train split has no column 'fr'; its columns are en, de.*--text_column"),
        (["--validation_split=train[90%:]"], r"split train and --validation_split train\[90%:\] have rows in common"),
        (["--test_split=dev"], r"--test_split dev: .*dev.*--test_split 'train\[90%:\]'"),
        (["--n_head=3"], "n_head=3 does not divide n_embd=16"),
        (["--n_positions=1"], "n_positions is 1"),
        (["--dropout=1"], "dropout is 1.0"),
        (["--n_layer=0"], "n_layer is 0"),
        (["--max_eval_samples=0"], "max_eval_samples is 0"),
        (["--vocab_size=100"], "vocab_size is 100"),
        (["--n_embed=8"], "did you mean n_embd"),
    ],
)
def test_bad_options_name_the_fix(options, argv, message):
    with pytest.raises(ValueError, match=message):
        language_modeling.main([*options, *argv])


def test_a_part_of_a_split_is_a_split(options):
    argv = ["--train_split=train[:75%]", "--validation_split=train[75%:]", "--max_steps=1", "--do_predict=false"]
    assert language_modeling.main([*options, *argv])["train_samples"] == 48
