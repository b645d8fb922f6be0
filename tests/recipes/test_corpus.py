"""The splits of the corpus, and what every generated sentence keeps to."""

import hashlib
import re
from typing import get_args

import pytest

import corpus
from corpus import grammar, words

SPLITS = get_args(grammar.Split)
# sha256 of generate("train", 200): a change of the grammar or of the drawing changes every published score.
DIGEST = "1607f1a8b8a5674d56677d672d105fcd90140109415313c896efcef5908a3987"


def vocabulary(sentences, side):
    return {word for sentence in sentences for word in re.findall(r"\w+", getattr(sentence, side).lower())}


@pytest.fixture(scope="module")
def train():
    return corpus.sentences("train", 10_000)


@pytest.fixture(scope="module")
def held_out():
    return {split: corpus.sentences(split, 500) for split in ("validation", "test")}


# --- The splits ---


def test_train_is_the_same_everywhere():
    lines = "\n".join(f"{pair['en']}\t{pair['de']}" for pair in corpus.generate("train", 200))
    assert hashlib.sha256(lines.encode()).hexdigest() == DIGEST


@pytest.mark.parametrize("split", SPLITS)
def test_arguments_decide_the_pairs(split):
    first = corpus.generate(split, 50, seed=3)
    assert corpus.generate(split, 80, seed=3)[:50] == first
    assert corpus.generate(split, 50, seed=4) != first


def test_20000_pairs_are_distinct_and_of_bounded_length():
    pairs = corpus.generate("train", 20_000)
    for side in ("en", "de"):
        assert len({pair[side] for pair in pairs}) == 20_000
        lengths = [len(pair[side].split()) for pair in pairs]
        assert min(lengths) >= 5
        assert max(lengths) <= 20


@pytest.mark.parametrize("split", SPLITS)
def test_every_sentence_keeps_to_the_pairs_of_its_split(split, train, held_out):
    for sentence in {"train": train, **held_out}[split]:
        assert sentence.pairs
        assert {grammar.split_of(noun, verb) for noun, verb in sentence.pairs} == {split}


@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_pairs_and_sentences_never_occur_in_training(split, train, held_out):
    trained = frozenset().union(*(sentence.pairs for sentence in train))
    for sentence in held_out[split]:
        assert not sentence.pairs & trained
    for side in ("en", "de"):
        assert not {getattr(s, side) for s in train} & {getattr(s, side) for s in held_out[split]}


@pytest.mark.parametrize("split", SPLITS)
def test_recorded_pairs_are_those_of_the_text(split, train, held_out):
    # Read off the words alone, where one subject noun and one verb leave no doubt: so the record cannot err.
    forms = {form: noun.en for noun in words.SUBJECTS for form in (noun.en, noun.en_plural)}
    checked = 0
    for sentence in {"train": train, **held_out}[split]:
        nouns = [forms[word] for word in re.findall(r"\w+", sentence.en.lower()) if word in forms]
        verbs = [verb.en for verb in words.VERBS if re.search(rf"\b{verb.en}\b", sentence.en)]
        if len(nouns) == len(verbs) == 1:
            assert sentence.pairs == {(nouns[0], verbs[0])}
            checked += 1
    assert checked > 100


@pytest.mark.parametrize("side", ["en", "de"])
def test_every_held_out_word_occurs_in_training(side, train, held_out):
    trained = vocabulary(train, side)
    for sentences in held_out.values():
        assert vocabulary(sentences, side) <= trained
    assert 150 <= len(trained) <= 300


def test_every_subject_and_verb_occurs_in_training(train):
    pairs = frozenset().union(*(sentence.pairs for sentence in train))
    assert {noun for noun, _ in pairs} == {noun.en for noun in words.SUBJECTS}
    assert {verb for _, verb in pairs} == {verb.en for verb in words.VERBS}


def test_load_gives_a_dataset_of_three_splits():
    splits = corpus.load(train_size=30, validation_size=20, test_size=10)
    assert {name: len(split) for name, split in splits.items()} == {"train": 30, "validation": 20, "test": 10}
    assert splits["test"].to_list() == corpus.generate("test", 10)


def test_bad_arguments_name_the_fix():
    with pytest.raises(ValueError, match="choose one of train, validation, test"):
        corpus.generate("dev", 10)
    with pytest.raises(ValueError, match="at least 1"):
        corpus.generate("train", 0)


def test_too_many_sentences_are_refused(monkeypatch):
    only = grammar.Sentence("One sentence is all.", "Ein Satz ist alles.", frozenset(), "sentence")
    monkeypatch.setattr(grammar.Grammar, "sentence", lambda self: only)
    with pytest.raises(ValueError, match="gave only 1 of 2 sentences; lower the size"):
        corpus.generate("train", 2)


# --- Rules that every German sentence keeps ---

CONTRACTED = r"\b([Ii]n dem|[Ii]n das|[Aa]n dem|[Zz]u dem|[Zz]u der)\b"


def test_generated_german_is_punctuated_and_contracted(train):
    for sentence in train:
        assert re.fullmatch(r"[A-ZÄÖÜ][\wäöüß, ]*\.", sentence.de), sentence.de
        assert not re.search(CONTRACTED, sentence.de), sentence.de
        # One comma before each clause that a conjunction opens, and one behind it where the sentence goes on.
        assert not re.search(r"[^,] (während|weil) ", sentence.de), sentence.de
        assert not re.search(r",,| ,|  |,\.", sentence.de), sentence.de


def test_generated_english_has_the_right_article(train):
    for sentence in train:
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", sentence.en), sentence.en


def test_every_construction_occurs(train):
    german = " ".join(sentence.de for sentence in train)
    for construction in (
        r"\. Während [^,.]+, \w+ ",  # a fronted clause, then the verb
        r", während [^,.]+\.",
        r", weil (er|sie|es|sie) \w+ (ist|sind)\.",
        r"[^,.]+, (der|die|das) [^,.]+, \w+",  # a relative clause in the middle
        r" zu, (der|die|das) [^,.]+\.",  # and one behind a prefix
        r"\. Eine Gruppe von \w+n ",
        r"\. (Im|Am|Vor|Auf) ",
        r" und (liest|hört|singt) ",
    ):
        assert re.search(construction, german), construction
