"""The classification recipe on a pretrained model: what is trained, on what, what is measured, and whole runs."""

import json
import re
from unittest import mock

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
)

import text_classification
from classification.calibration import calibration_error
from classification.fine_tuning import FineTuningArguments, layer_rates, with_own_rates
from classification.forgetting import Forgetting, ForgettingArguments, embed, probe_accuracy
from common.arguments import OptimizerArguments, TextTrainingArguments
from common.run import prepare
from hf_fngd import FNGDConfig
from tests.recipes.running import assert_best_is_scored, have_equal_weights, in_parts, interrupted
from tests.recipes.translate_pairs import PAIRS
from text.data import draw_shots
from text.tokenizer import EOS, train_tokenizer
from text_classification import DataArguments, ModelArguments, build_model, choose_rows

# PEFT reads it of every model.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
ROWS = [{"text": pair["en"], "label": pair["en"].split()[1]} for pair in PAIRS]  # who does what: four classes
LORA = ["--lora_r=2", "--lora_target_modules", "query", "dense", "--learning_rate=0.05"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Return a folder that holds an encoder and its tokenizer."""
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    train_tokenizer([row["text"] for row in ROWS], 300, f"{EOS} $A").save_pretrained(folder)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=300, hidden_size=16, **sizes, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def argv(pretrained, tmp_path):
    """Return the command line of a run of two epochs of four steps each."""
    rows = tmp_path / "rows"
    rows.mkdir()
    for split, part in {"train": ROWS, "validation": ROWS[::4], "test": ROWS[::4]}.items():
        (rows / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    common = "--max_length=32 --per_device_train_batch_size=16 --num_train_epochs=2 --disable_tqdm=true"
    data = [f"--dataset_name={rows}", f"--output_dir={tmp_path / 'out'}"]
    return [f"--model_name_or_path={pretrained}", *data, *common.split(), "--learning_rate=0.01"]


def built(pretrained, **options):
    """Return a model with three classes, and what is trained of it."""
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    return build_model(tokenizer, ModelArguments(model_name_or_path=str(pretrained), **options), 32, ["a", "b", "c"])


# Measures -------------------------------------------------------------------------------------------------


def test_the_calibration_error_is_that_computed_by_hand():
    confidence = np.array([0.95, 0.95, 0.92, 0.62])  # with 15 bins three of them, with 10 two
    logits = np.log(np.stack([confidence, 1 - confidence], axis=1))
    expected = (abs(1 - 0.95 - 0.95) + abs(0 - 0.92) + abs(1 - 0.62)) / 4
    assert calibration_error(logits, np.array([0, 1, 1, 0])) == pytest.approx(expected, rel=1e-12)
    assert calibration_error(1e4 * logits, np.array([0, 1, 1, 0])) == pytest.approx(0.5)
    assert np.isnan(calibration_error(np.array([[np.nan, 0.0]]), np.array([0])))


def test_the_probe_is_ridge_regression():
    torch.manual_seed(0)
    means = torch.randn(3, 5, dtype=torch.float64)
    labels, others = torch.randint(3, (60,)), torch.randint(3, (400,))
    train, test = (means[each] + torch.randn(len(each), 5, dtype=torch.float64) for each in (labels, others))
    centred, ridge = train - train.mean(0), 1e-3 * (train - train.mean(0)).square().sum() / 5
    left = torch.cat([centred, ridge.sqrt() * torch.eye(5)])
    targets = F.one_hot(labels).double()
    weight = torch.linalg.lstsq(left, torch.cat([targets - targets.mean(0), torch.zeros(5, 3)])).solution
    found = ((test - train.mean(0)) @ weight + targets.mean(0)).argmax(1)
    assert probe_accuracy(train, labels, test, others) == (found == others).double().mean() > 0.6
    assert probe_accuracy(1e3 * train, labels, 1e3 * test, others) == probe_accuracy(train, labels, test, others)
    assert np.isnan(probe_accuracy(train * float("nan"), labels, test, others))


@pytest.mark.parametrize("options", [{}, {"lora_r": 2}], ids=["full", "lora"])
def test_forgetting_compares_mean_embeddings(pretrained, options):
    (model, _), tokenizer = built(pretrained, **options), AutoTokenizer.from_pretrained(pretrained)
    texts = [row["text"] for row in ROWS[:3]] + ["A"]  # of unlike lengths
    encoder = BertModel.from_pretrained(pretrained).eval()
    means = [encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in texts]
    assert torch.allclose(embed(model.train(), tokenizer, texts, 32).float(), torch.stack(means), atol=1e-6)
    assert model.training
    rows = Dataset.from_dict({"text": texts, "labels": [0, 1, 0, 1]})
    forgetting = Forgetting(model, tokenizer, DatasetDict(train=rows, test=rows), 100, 32)
    same = forgetting.measure()
    assert same["forgetting_cosine"] == pytest.approx(1)
    assert same["forgetting_probe_before"] == same["forgetting_probe_after"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert forgetting.measure()["forgetting_cosine"] < 0.9


# Data -----------------------------------------------------------------------------------------------------


def test_shots_are_drawn_by_class_and_seed():
    labels = [0, 2, 2, 0, 0, 2, 0]
    drawn, rest = draw_shots(labels, 2, seed=1)
    assert sorted(labels[place] for place in drawn) == [0, 0, 2, 2]
    assert sorted([*drawn, *rest]) == list(range(7))
    assert len({tuple(draw_shots(labels, 2, seed)[0]) for seed in range(9)}) > 1
    with pytest.raises(ValueError, match="Class 2 has 3 training rows to draw 4 from: lower --shots"):
        draw_shots(labels, 4, seed=1)


def test_validation_rows_are_apart_and_the_same_for_all_seeds():
    rows = Dataset.from_dict({"text": list(map(str, range(40))), "labels": [0, 1] * 20})
    arguments = DataArguments(shots=3, validation_shots=5)
    one, other = (choose_rows(DatasetDict(train=rows, validation=rows), arguments, seed) for seed in (1, 2))
    assert list(one["validation"]["text"]) == list(other["validation"]["text"]) != list(rows["text"])
    assert set(one["train"]["text"]).isdisjoint(one["validation"]["text"])
    assert list(one["train"]["text"]) != list(other["train"]["text"])
    assert (len(one["train"]), len(one["validation"])) == (6, 10)


# What is trained ------------------------------------------------------------------------------------------


def rate(name):
    """Return the factor of a parameter of a BERT of two layers, with a decay of 0.5 and a head factor of 3."""
    if "classifier" in name:
        return 3.0
    if ".embeddings." in name:
        return 0.125
    layer = re.search(r"\.layer\.(\d)\.", name)
    return 0.5 ** (2 - int(layer[1])) if layer else 1.0


@pytest.mark.parametrize("options", [{}, {"lora_r": 2}], ids=["full", "lora"])
@pytest.mark.parametrize("optimizer", ["adamw", "fngd"])
def test_rates_fall_from_layer_to_layer(pretrained, tmp_path, optimizer, options):
    model, _ = built(pretrained, **options)
    args = TextTrainingArguments(output_dir=str(tmp_path), learning_rate=0.4, weight_decay=0.1)
    chosen = FineTuningArguments(model_name_or_path="tiny", layer_decay=0.5, head_factor=3)
    run = with_own_rates(prepare((OptimizerArguments(optimizer=optimizer), args)), model, optimizer, chosen)
    factory, kwargs = run.optimizer
    groups = factory()(model, **kwargs).param_groups
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if "bias" in name or "LayerNorm" in name else 0.1
            assert found[id(parameter)] == (pytest.approx(0.4 * rate(name)), decay), name
    assert sum(map(len, layer_rates(model, 0.5).values())) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "fngd"])
def test_the_head_alone_has_another_rate(argv, tmp_path, optimizer):
    more = ["--head_factor=5", f"--optimizer={optimizer}", "--max_steps=1", "--lr_scheduler_type=constant"]
    plain = text_classification.main([*argv, *more[1:], "--save_strategy=no"])
    report = text_classification.main([*argv, *more, "--overwrite_output_dir=true"])
    assert report["train_loss"] == plain["train_loss"]  # of the first step
    assert report["eval_loss"] != plain["eval_loss"]
    assert (
        "all weights were trained; the output layers at 5 times the rate"
        in (tmp_path / "out" / "README.md").read_text()
    )


def test_rates_of_other_stacks():
    sizes = {"vocab_size": 30, "n_positions": 8, "n_embd": 4, "n_layer": 1, "n_head": 1}
    rates = layer_rates(GPT2ForSequenceClassification(GPT2Config(**sizes)), 0.5)
    assert rates[1.0] == ["transformer.ln_f.weight", "transformer.ln_f.bias", "score.weight"]
    assert rates[0.25] == ["transformer.wte.weight", "transformer.wpe.weight"]
    sizes = {f"{side}_{name}": 4 for side in ("encoder", "decoder") for name in ("ffn_dim", "attention_heads")}
    bart = BartForSequenceClassification(BartConfig(vocab_size=30, d_model=4, **sizes, max_position_embeddings=8))
    with pytest.raises(ValueError, match="one stack of numbered layers, which BartFor"):
        layer_rates(bart, 0.5)
    with pytest.raises(ValueError, match="output layers outside the encoder, which BertModel has not"):
        layer_rates(BertModel(BertConfig(hidden_size=4, num_attention_heads=1, num_hidden_layers=1)), head=2.0)


def test_what_the_checkpoint_lacks_is_trained(pretrained, tmp_path):
    BertModel.from_pretrained(pretrained, add_pooling_layer=False).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(pretrained).save_pretrained(tmp_path)
    for options in ({"freeze_encoder": True}, {"lora_r": 2}):
        model, trained = built(tmp_path, **options)
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        for module in ("bert.pooler.dense", "classifier"):
            assert module in trained
            assert any(re.search(rf"{module}(\.modules_to_save\.default)?\.weight$", name) for name in names), names
        assert not any("embeddings" in name for name in names)


def test_the_other_task_may_be_any_dataset(tmp_path):
    for split in ("train", "test"):
        rows = {"text": [f"{split} {n}" for n in range(6)], "label": [0, 1] * 3}
        Dataset.from_dict(rows).to_json(tmp_path / "other" / f"{split}.jsonl")
    arguments = ForgettingArguments(forgetting_dataset=str(tmp_path / "other"), forgetting_samples=4)
    splits = text_classification.load_forgetting(arguments)
    assert splits["train"]["text"][0] == "train 0"
    assert splits["test"]["text"][0] == "test 0"


# Whole runs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["fngd", "adamw"])
def test_adapters_load_as_the_card_says(argv, pretrained, tmp_path, monkeypatch, optimizer):
    forgetting = ["--forgetting_dataset=subjects", "--forgetting_samples=50", "--predict_first_epoch=true"]
    shots = ["--shots=12", "--validation_shots=2"]
    report = text_classification.main([*argv, *LORA, *forgetting, *shots, f"--optimizer={optimizer}"])
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "start: `tiny`; trained: LoRA adapters of rank 2 (alpha 4, dropout 0) on query, dense" in card
    assert ", and all weights of classifier\n- data: `rows`, 48 training rows, 12 of each class" in card
    assert str(tmp_path) not in card
    assert f"optimizer: **{report['optimizer']}**" in card
    assert "| | accuracy | expected calibration error, 15 bins | loss |" in card
    assert "| test, after one epoch |" in card
    assert f"cosine similarity of\n  {report['forgetting_cosine']:.4f} with those" in card
    assert "library_name: peft" in card
    assert report["first_predict_loss"] != report["predict_loss"]
    assert 0 < report["forgetting_cosine"] < 1
    assert 0 < report["forgetting_probe_before"] < 1

    (tmp_path / "tiny").symlink_to(pretrained)
    monkeypatch.chdir(tmp_path / "out" / "..")
    names = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace('"out"', '"./out"'), names)
    tokenizer, model = AutoTokenizer.from_pretrained("./out"), names["model"].eval()
    batch = tokenizer([row["text"] for row in ROWS[::4]], padding=True, return_tensors="pt")
    found = [model.config.id2label[number] for number in model(**batch).logits.argmax(-1).tolist()]
    assert np.mean([n == row["label"] for n, row in zip(found, ROWS[::4], strict=True)]) == report["predict_accuracy"]


def test_a_frozen_encoder_stays(argv, pretrained, tmp_path):
    report = text_classification.main([*argv, "--freeze_encoder=true"])
    before, after = load_file(pretrained / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(after[f"bert.{name}"], tensor) for name, tensor in before.items())
    assert report["parameters"] == 4 * 16 + 4
    with pytest.raises(ValueError, match="Muon has nothing to step"):
        text_classification.main([*argv, "--freeze_encoder=true", "--optimizer=muon", "--overwrite_output_dir=true"])


@pytest.mark.parametrize("more", [[], ["--layer_decay=0.7", "--optimizer=adamw"], LORA], ids=["full", "decay", "lora"])
def test_an_interrupted_run_ends_like_one_that_was_not(argv, tmp_path, more):
    whole, resumed = interrupted(text_classification.main, [*argv, *more, "--predict_first_epoch=true"], tmp_path)
    for name in ("predict_loss", "first_predict_loss"):
        assert resumed[name] == whole[name]


@pytest.mark.parametrize("more", [[], LORA], ids=["full", "lora"])
def test_the_best_epoch_is_scored_or_kept_and_training_stops_early(argv, tmp_path, more):
    out = tmp_path / "out"
    assert_best_is_scored(text_classification.main, [*argv, *more], out, 1e-5)
    # The first epoch has the largest loss, and is "best" here.
    best = "--metric_for_best_model=loss --greater_is_better=true --load_best_model_at_end=true --save_total_limit=2"
    stop = ["--early_stopping_patience=1", "--num_train_epochs=9", "--overwrite_output_dir=true"]
    report = text_classification.main([*argv, *more, *best.split(), *stop])
    assert report["stopped_at"] == 2
    assert have_equal_weights(out, out / "checkpoint-4")
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "- 2 epochs, stopped early (9 epochs at most), the weights of the best loss kept, in batches of 16" in card
    again = text_classification.main([*argv, *more, *best.split(), *stop[:2]])  # it has ended, and stays so
    assert again["predict_loss"] == report["predict_loss"]
    assert again["stopped_at"] < 3


@pytest.mark.parametrize("more", [["--layer_decay=0.7", "--optimizer=adamw"], LORA], ids=["decay", "lora"])
def test_accumulation_and_bf16_change_little(argv, tmp_path, more):
    whole, parts = in_parts(text_classification.main, [*argv, *more, "--max_steps=3"], tmp_path, size=4, parts=4)
    half = text_classification.main([*argv, *more, "--max_steps=3", "--bf16=true", "--use_cpu=true"])
    for name in ("train_loss", "eval_loss"):
        assert parts[name] == pytest.approx(whole[name], rel=5e-2)
        assert half[name] == pytest.approx(whole[name], rel=2e-2)
        assert half[name] != whole[name]


@pytest.mark.parametrize("more", [["--optimizer=adamw"], LORA], ids=["full", "lora"])
def test_what_is_pushed_has_the_recipes_card(argv, tmp_path, more):
    pushed = ["--push_to_hub=true", "--hub_model_id=someone/tiny-requests", "--hub_strategy=end"]
    with mock.patch("transformers.trainer.hf_api") as api, mock.patch("transformers.Trainer.init_hf_repo"):
        text_classification.main([*argv, *more, *pushed])
    assert str(api.return_value.upload_folder.call_args.kwargs["folder_path"]) == str(tmp_path / "out")
    assert "by hf_fngd's `recipes/text_classification.py`" in (tmp_path / "out" / "README.md").read_text()


def test_a_resumed_configuration_has_the_layers_rates(argv, tmp_path):
    text_classification.main([*argv, "--layer_decay=0.5"])
    groups = FNGDConfig.from_pretrained(tmp_path / "out").param_groups
    assert [group["lr"] for group in groups] == pytest.approx([0.005, 0.0025, 0.00125])
    assert groups[0]["params"] == r"bert\.encoder\.layer\.1\..*"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lora_alpha=8"], "lora_alpha: options of LoRA, which need --lora_r"),
        (["--lora_r=0"], "lora_r is 0"),
        (["--lora_r=2", "--lora_dropout=1"], r"lora_dropout is 1.0; it must lie in \[0, 1\)"),
        (["--lora_r=2", "--freeze_encoder=true"], "leave out --lora_r, --layer_decay and --head_factor"),
        (["--head_factor=0"], "head_factor is 0.0; it must be above 0"),
        (["--head_factor=2", "--optimizer=sgd"], "sgd has no use for --head_factor"),
        (["--layer_decay=1"], "layer_decay is 1.0"),
        (["--layer_decay=0.5", "--optimizer=sgd"], "sgd has no use for --layer_decay"),
        (["--layer_decay=0.5", "--fallback_lr=1"], "leave out --fallback_lr"),
        (["--head_factor=2", "--fallback_lr=1"], "leave out --fallback_lr"),
        (["--validation_shots=2", "--max_eval_samples=3"], "leave out --validation_split and --max_eval_samples"),
        (["--early_stopping_patience=1"], "needs --load_best_model_at_end"),
        (["--shots=17"], "Class 0 has 16 training rows to draw 17"),
    ],
)
def test_bad_options_name_the_fix(argv, more, message):
    with pytest.raises(ValueError, match=message):
        text_classification.main([*argv, *more])


@pytest.mark.parametrize("option", ["--lora_r=2", "--freeze_encoder=true", "--forgetting_dataset=subjects"])
def test_a_new_model_is_not_fine_tuned(argv, option):
    with pytest.raises(ValueError, match=r"need --model_name_or_path|name one by --model_name_or_path"):
        text_classification.main([*argv[1:], option])
