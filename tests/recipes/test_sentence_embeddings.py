"""The recipe of sentence embeddings: whole runs."""

from unittest import mock

import pytest
from sentence_transformers import SentenceTransformer

import sentence_embeddings
from sentence_embeddings import DataArguments, EmbeddingTrainingArguments, ModelArguments, Retrieval
from tests.recipes.running import have_equal_weights, interrupted, read, short
from text import card
from translation.data import load_pairs

TINY = ["--hidden_size=16", "--num_hidden_layers=1", "--num_attention_heads=2", "--vocab_size=300", "--dropout=0"]
TINY += ["--max_length=32", "--num_train_epochs=2", "--use_cpu=true"]  # of four steps each


@pytest.fixture
def argv(tmp_path):
    """Return the command line of a run."""
    return short(tmp_path, *TINY)


@pytest.mark.parametrize("more", [[], ["--mini_batch_size=4"], ["--optimizer=adamw"]], ids=["fngd", "parts", "adamw"])
def test_a_run_learns_to_find_translations(argv, tmp_path, more):
    report = sentence_embeddings.main([*argv, *more, "--num_train_epochs=6"])
    assert report["predict_accuracy"] > 0.8  # untrained: 3 of 16
    assert report["predict_loss"] < 0.5  # untrained: 2.6
    out = tmp_path / "out"
    assert read(out, "all_results.json")["predict_accuracy"] == report["predict_accuracy"]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"optimizer: **{report['optimizer']}**" in card
    assert "library_name: sentence-transformers" in card
    assert (out / "learning_curve.png").stat().st_size > 1000
    # What was saved is what was scored.
    pairs = load_pairs(DataArguments(dataset_name=str(tmp_path / "pairs")))["test"]
    assert Retrieval(pairs, 8)(SentenceTransformer(str(out), device="cpu"))["accuracy"] == report["predict_accuracy"]


def test_parts_of_a_batch_have_the_loss_and_the_gradient_of_the_whole(argv, tmp_path):
    same = [*argv, "--optimizer=sgd", "--max_steps=3"]
    whole = sentence_embeddings.main([*same, f"--output_dir={tmp_path / 'whole'}"])
    parts = sentence_embeddings.main([*same, "--mini_batch_size=5", f"--output_dir={tmp_path / 'parts'}"])
    assert parts["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-5)
    assert parts["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-5)


def test_an_interrupted_run_ends_like_one_that_was_not(argv, tmp_path):
    whole, resumed = interrupted(sentence_embeddings.main, argv, tmp_path)
    assert resumed["predict_loss"] == whole["predict_loss"]


def test_a_model_that_is_named_is_gone_on_from(argv, tmp_path):
    sentence_embeddings.main(argv)
    named = [argument for argument in argv if argument.split("=")[0] not in {option.split("=")[0] for option in TINY}]
    more = [
        "--max_length=32",
        "--use_cpu=true",
        "--max_steps=1",
        "--learning_rate=0",
        f"--output_dir={tmp_path / 'on'}",
    ]
    report = sentence_embeddings.main([*named, f"--model_name_or_path={tmp_path / 'out'}", *more])
    assert have_equal_weights(tmp_path / "out", tmp_path / "on")
    assert report["model_name_or_path"] == "out"
    assert "start: `out`; all weights were trained" in (tmp_path / "on" / "README.md").read_text(encoding="utf-8")


def test_what_is_pushed_has_the_recipes_card(argv, tmp_path):
    pushed = ["--push_to_hub=true", "--hub_model_id=someone/tiny", "--hub_strategy=end", "--max_steps=1"]
    with mock.patch("transformers.trainer.hf_api") as api, mock.patch("transformers.Trainer.init_hf_repo"):
        sentence_embeddings.main([*argv, *pushed])
    assert str(api.return_value.upload_folder.call_args.kwargs["folder_path"]) == str(tmp_path / "out")
    assert "by hf_fngd's `recipes/sentence_embeddings.py`" in (tmp_path / "out" / "README.md").read_text()


def test_a_card_keeps_a_split_without_a_loss():
    table = card._scores({"eval_accuracy": 0.5, "eval_loss": 1.25, "predict_accuracy": 0.75})
    assert table.splitlines()[2:] == ["| validation | 0.5 | 1.25 |", "| test | 0.75 | - |"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataArguments(scale=0.0), "scale is 0.0"),
        (lambda: DataArguments(mini_batch_size=0), "mini_batch_size"),
        (lambda: ModelArguments(model_name_or_path="a/b", hidden_size=64), "hidden_size: options of a new model"),
        (lambda: ModelArguments(hidden_size=30), "num_attention_heads"),
        (lambda: EmbeddingTrainingArguments("out", use_cpu=True, data_seed=1), "leave out --data_seed"),
        (
            lambda: EmbeddingTrainingArguments("out", use_cpu=True, train_sampling_strategy="sequential"),
            "leave out --train_sampling_strategy",
        ),
    ],
)
def test_options_that_no_run_can_use_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
