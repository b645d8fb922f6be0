"""Datasets, tokenizer, batches of the translation recipe."""

from functools import partial

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from tests.recipes.translate_pairs import PAIRS, write_splits
from text.data import LENGTH, TEXT, encode, longest_first
from text.sampler import ShuffledLengthGroups
from text.tokenizer import train_tokenizer
from translation.arguments import DataArguments, name_of_test_set
from translation.data import load_pairs, tokenize, training_texts

TEXTS = [pair[lang] for lang in ("en", "de") for pair in PAIRS]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("validation", ["val", "validation", "dev"])
def test_both_formats_and_all_split_names_give_the_same_pairs(tmp_path, nested, validation):
    folder = write_splits(tmp_path / "pairs", nested=nested, splits=("train", validation, "test"))
    pairs = load_pairs(DataArguments(dataset_name=str(folder)))
    assert {name: len(split) for name, split in pairs.items()} == {"train": 64, "validation": 16, "test": 16}
    assert pairs["train"]["source"] == [pair["en"] for pair in PAIRS]
    assert pairs["train"]["target"] == [pair["de"] for pair in PAIRS]
    assert list(training_texts(pairs["train"])) == TEXTS


def test_languages_swap_and_splits_shorten(tmp_path):
    limits = {"max_train_samples": 5, "max_eval_samples": 3, "max_predict_samples": 100}
    folder = str(write_splits(tmp_path / "pairs"))
    arguments = DataArguments(dataset_name=folder, source_lang="de", target_lang="en", **limits)
    pairs = load_pairs(arguments)
    assert pairs["train"]["source"] == [pair["de"] for pair in PAIRS[:5]]
    assert (len(pairs["validation"]), len(pairs["test"])) == (3, 16)


@pytest.mark.parametrize("nested", [False, True], ids=["columns", "languages"])
def test_a_missing_language_names_those_that_exist(tmp_path, nested):
    folder = write_splits(tmp_path / "pairs", nested=nested)
    kind = "languages" if nested else "columns"
    with pytest.raises(ValueError, match=rf"no language 'fr'; its {kind} are (en, de|de, en)\."):
        load_pairs(DataArguments(dataset_name=str(folder), target_lang="fr"))


def test_a_missing_split_is_an_error(tmp_path):
    folder = write_splits(tmp_path / "pairs", splits=("train", "test"))
    with pytest.raises(ValueError, match=r"has the splits train, test and lacks validation"):
        load_pairs(DataArguments(dataset_name=str(folder)))


def test_a_test_set_is_a_split_or_a_file(tmp_path):
    folder = write_splits(tmp_path / "pairs", splits=("train", "val", "test"))
    (folder / "more.csv").write_text("en,de\nA cat.,Eine Katze.\n", encoding="utf-8")
    assert [name_of_test_set(name) for name in ("a.csv", "wmt14.1", "wmt14.2", "b/c-d.json")] == [
        "a",
        "wmt14_1",
        "wmt14_2",
        "c_d",
    ]
    pairs = load_pairs(DataArguments(dataset_name=str(folder), test_sets=[str(folder / "more.csv")]))
    assert pairs["more"][:] == {"source": ["A cat."], "target": ["Eine Katze."]}
    swapped = DataArguments(dataset_name=str(folder), source_lang="de", target_lang="fr", test_sets=["nowhere.csv"])
    with pytest.raises(ValueError, match=r"'nowhere\.csv', which is no file .* splits: train, validation, test"):
        load_pairs(swapped)


@pytest.mark.parametrize("test_sets", [["a.csv", "other/a.jsonl"], ["test.csv"], ["a-b.csv", "a b"]])
def test_test_sets_of_equal_names_are_refused(test_sets):
    with pytest.raises(ValueError, match="must differ from each other"):
        DataArguments(test_sets=test_sets)


def test_an_empty_text_is_an_error(tmp_path):
    folder = write_splits(tmp_path / "pairs")
    with (folder / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"en": "Hello.", "de": "  "}\n')
    with pytest.raises(ValueError, match=r"Row 64 of the train split has no text in 'de'"):
        load_pairs(DataArguments(dataset_name=str(folder)))


@pytest.mark.parametrize(
    "text", ["Ein Mädchen schläft draußen.", "ÄÖÜ äöü ß „Zitat“ 日本 🙂", "two  spaces , and a tab\there", "x"]
)
def test_tokenizer_gives_back_any_text(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_word_has_the_same_tokens_at_the_start_and_inside(tokenizer):
    start, inside = tokenizer("draußen")["input_ids"], tokenizer("läuft draußen")["input_ids"]
    assert inside[-len(start) :] == start


def test_tokenizer_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert (loaded.pad_token_id, loaded.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert set(loaded("a")) == {"input_ids", "attention_mask"}


def test_tokenizer_training_is_deterministic(tokenizer):
    assert train_tokenizer(TEXTS, 300).get_vocab() == tokenizer.get_vocab()


def test_vocabulary_needs_room_for_every_byte():
    with pytest.raises(ValueError, match=r"vocab_size is 257; .* at least 258"):
        train_tokenizer(TEXTS, 257)


def test_splits_to_evaluate_on_are_sorted_and_keep_their_texts(tokenizer):
    rows = Dataset.from_dict({TEXT: TEXTS})
    encoded = encode(DatasetDict({"test": rows}), lambda batch: tokenizer(batch[TEXT]), None)["test"]
    ordered = longest_first(encoded)
    lengths = [len(ids) for ids in ordered["input_ids"]]
    assert lengths == sorted(lengths, reverse=True) == ordered[LENGTH] != encoded[LENGTH]
    assert tokenizer.batch_decode(list(ordered["input_ids"]), skip_special_tokens=True) == ordered[TEXT]


def test_a_row_is_as_long_as_its_longer_side():
    columns = {"input_ids": [[1], [1, 2]], "labels": [[1, 2, 3], [1]]}
    rows = DatasetDict({"train": Dataset.from_dict({TEXT: ["a", "b"]})})
    assert list(encode(rows, lambda batch: columns, None)["train"][LENGTH]) == [3, 2]


def test_long_sentences_are_cut_and_end_in_eos(tmp_path, tokenizer):
    folder = write_splits(tmp_path / "pairs")
    arguments = DataArguments(dataset_name=str(folder), max_source_length=4, max_target_length=5)
    encoded = encode(load_pairs(arguments), partial(tokenize, tokenizer, arguments), None)["train"]
    assert {len(ids) for ids in encoded["input_ids"]} == {4}
    assert {len(ids) for ids in encoded["labels"]} == {5}
    assert set(encoded["length"]) == {5}
    assert {ids[-1] for ids in encoded["labels"]} == {tokenizer.eos_token_id}


def test_sampler_shuffles_groups_of_like_length():
    lengths = torch.randint(1, 50, (1003,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = ShuffledLengthGroups(lengths, batch_size=10, seed=0)
    rows = list(sampler)
    assert sorted(rows) == list(range(1003))
    assert len(sampler) == 1003
    groups = [[lengths[row] for row in rows[i : i + 10]] for i in range(0, 1000, 10)]
    padding = sum(max(group) - length for group in groups for length in group) / 1000
    assert padding < 3  # random batches: about 20
    means = torch.tensor([sum(group) / 10 for group in groups])
    rising = (means[1:] > means[:-1]).float().mean()
    assert 0.35 < rising < 0.65  # sorted groups: near 0


def test_sampler_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = ShuffledLengthGroups(list(range(100)), batch_size=4, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(*key)) for key in [(0, 0), (0, 1), (7, 0)]}) == 3
