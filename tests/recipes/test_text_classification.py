"""The classification recipe: its embedded data, labels, whole runs."""

import json

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2ForSequenceClassification

import text_classification
from classification import subjects
from tests.recipes.running import assert_matrices, in_parts, read
from tests.recipes.translate_pairs import PAIRS
from text.tokenizer import EOS, train_tokenizer
from text_classification import ModelArguments, build_model, number_labels

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 300}
NEW_MODEL = [f"--{name}={value}" for name, value in TINY.items()]
# Who sings, from "A man sings here.": four classes, by name.
ROWS = [{"sentence": pair["en"], "who": pair["en"].split()[1]} for pair in PAIRS]


@pytest.fixture
def options(tmp_path):
    """Return the command line of a run of four steps, without a model."""
    folder = tmp_path / "rows"
    folder.mkdir()
    for split, rows in {"train": ROWS, "validation": ROWS[::4], "test": ROWS[1::4]}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    common = "--text_column=sentence --label_column=who --max_length=32 --per_device_train_batch_size=16"
    common += " --num_train_epochs=1 --learning_rate=0.01 --save_strategy=no --disable_tqdm=true"
    return [f"--dataset_name={folder}", f"--output_dir={tmp_path / 'out'}", *common.split()]


@pytest.fixture
def tokenizer():
    return train_tokenizer([row["sentence"] for row in ROWS], 300, f"{EOS} $A")


@pytest.fixture(scope="module")
def embedded():
    return subjects.load(300, 40, 40)


def test_embedded_labels_are_the_subject_of_the_main_clause(embedded):
    names = embedded["train"].features["label"].names
    assert sum(len(embedded[split]) for split in embedded) == 380
    assert len({text for split in embedded for text in embedded[split]["text"]}) == 380
    later = 0
    for row in embedded["train"]:
        noun = subjects.SUBJECTS[row["label"]]
        assert noun.en == names[row["label"]]
        # English tells by the order: the main clause comes first, or behind the comma of the clause in front.
        aside, _, rest = row["text"].partition(", ") if row["text"].startswith("While ") else ("", "", row["text"])
        words = rest.rstrip(".").split()
        beings = [word for word in words if any(word in (each.en, each.en_plural) for each in subjects.SUBJECTS)]
        assert beings[0] in (noun.en, noun.en_plural), row
        later += bool(aside)
    assert 30 < later < 150  # the first being is not the answer


def test_more_rows_to_train_on_leave_the_others_as_they_are(embedded):
    more = subjects.load(320, 40, 40)
    for split in ("validation", "test"):
        assert more[split]["text"] == embedded[split]["text"]
    assert list(more["train"]["text"])[:300] == list(embedded["train"]["text"])
    with pytest.raises(ValueError, match="test_size is 0"):
        subjects.load(10, 10, 0)


def splits(train, other, feature=None):
    """Return splits with these labels."""

    def rows(labels):
        data = Dataset.from_dict({"text": ["a"] * len(labels), "label": labels})
        return data if feature is None else data.cast_column("label", feature)

    return DatasetDict({"train": rows(train), "test": rows(other)})


@pytest.mark.parametrize(
    ("train", "other", "feature", "numbers", "names"),
    [
        (["b", "a", "b"], ["a"], None, [1, 0, 1], ["a", "b"]),
        ([5, 3], [3], None, [1, 0], ["3", "5"]),
        ([2, 0], [1], ClassLabel(names=["x", "y", "z"]), [2, 0], ["x", "y", "z"]),
    ],
)
def test_labels_are_numbered(train, other, feature, numbers, names):
    numbered, found = number_labels(splits(train, other, feature))
    assert found == names
    assert list(numbered["train"]["labels"]) == numbers
    assert found[numbered["test"]["labels"][0]] == (feature.names[other[0]] if feature else str(other[0]))


@pytest.mark.parametrize(
    ("train", "other", "message"),
    [
        ([0, 1], [-1], "test split has labels that training does not have: -1.*--test_split"),
        (["a", "b"], [None], "test split has labels .* None"),
        (["a", "b", None], ["a"], "train split has labels .* None"),
        ([0.5, 1.5], [0.5], "like 0.5 are no classes.*--label_column"),
        (["a", "a"], ["a"], "one class alone"),
    ],
)
def test_labels_that_nobody_can_learn_are_errors(train, other, message):
    with pytest.raises(ValueError, match=message):
        number_labels(splits(train, other))


@pytest.mark.parametrize("optimizer", ["fngd", "eva"])
def test_a_run_leaves_a_model_that_loads_and_a_true_report(tmp_path, options, optimizer):
    text_classification.main([*options, *NEW_MODEL, f"--optimizer={optimizer}"])
    out = tmp_path / "out"
    results = read(out, "all_results.json")
    assert results["optimizer"] == {"fngd": "FNGD", "eva": "Eva"}[optimizer]
    assert {"step_seconds_mean", "train_loss", "eval_loss", "eval_accuracy", "predict_loss"} <= set(results)
    assert (results["num_labels"], results["train_samples"]) == (4, 64)
    assert f"optimizer: **{results['optimizer']}**" in (out / "README.md").read_text(encoding="utf-8")

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    batch = tokenizer([row["sentence"] for row in ROWS[1::4]], padding=True, return_tensors="pt")
    found = [model.config.id2label[number] for number in model(**batch).logits.argmax(-1).tolist()]
    right = sum(name == row["who"] for name, row in zip(found, ROWS[1::4], strict=True))
    assert results["predict_accuracy"] == right / 16


def test_training_classifies(options):
    argv = [*options, *NEW_MODEL, "--hidden_size=32", "--dropout=0", "--optimizer=adamw", "--num_train_epochs=20"]
    assert text_classification.main([*argv, "--eval_strategy=no"])["predict_accuracy"] == 1.0


def test_accumulation_does_not_change_the_training(tmp_path, options):
    argv = [*options, *NEW_MODEL, "--optimizer=sgd", "--dropout=0", "--max_steps=3", "--learning_rate=0.3"]
    whole, parts = in_parts(text_classification.main, argv, tmp_path, size=4, parts=4)
    for name in ("train_loss", "eval_loss"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-4)


def test_a_model_by_name_is_fine_tuned_whatever_it_classified_before(tmp_path, options, tokenizer):
    folder = tmp_path / "gpt2"
    tokenizer.pad_token = None  # as GPT-2's
    tokenizer.save_pretrained(folder)
    config = GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=32, num_labels=7)
    torch.manual_seed(0)
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    report = text_classification.main([*options, f"--model_name_or_path={folder}", "--optimizer=sgd"])
    assert (report["model"], report["num_labels"]) == ("GPT2ForSequenceClassification", 4)
    with pytest.raises(ValueError, match="hidden_size: options of a new model"):
        text_classification.main([*options, f"--model_name_or_path={folder}", "--hidden_size=16"])


def test_fngd_and_the_baselines_take_blocks_and_pooler(tokenizer):
    model, _ = build_model(tokenizer, ModelArguments(**TINY), 32, ["a", "b", "c"])
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {"classifier", "bert.pooler.dense"} <= linear
    batch = tokenizer([row["sentence"] for row in ROWS[:4]], padding=True, return_tensors="pt")
    assert_matrices(model, linear - {"classifier"}, head="classifier", **batch, labels=torch.tensor([0, 1, 2, 0]))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--label_column=stars"], "no column 'stars'; its columns are sentence, who.*--label_column"),
        (["--max_length=0"], "max_length is 0"),
        (["--num_attention_heads=3"], "num_attention_heads=3 does not divide hidden_size=16"),
        (["--num_hidden_layers=0"], "num_hidden_layers is 0"),
    ],
)
def test_bad_options_name_the_fix(options, argv, message):
    with pytest.raises(ValueError, match=message):
        text_classification.main([*options, *NEW_MODEL, *argv])
