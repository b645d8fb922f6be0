"""English-German caption pairs from a small grammar: translation data without a download.

A sentence is drawn as a structure (subject, verb, object, place, a second clause) and written out twice, once
by the rules of each language. The German side has what makes the pair hard: three genders, three cases, the
three adjective declensions, weak nouns, verb-second order with inversion, verb-final subordinate clauses and
separable verbs. Every sentence describes a picture, in the present, in the manner of Multi30K.

Held-out rule: each clause pairs a subject noun with a verb, and `split_of` assigns that pair to one split by
the CRC-32 of its name. A split draws only pairs of its own, so no subject and verb that meet in a validation
or test sentence ever meet in training, while every noun and every verb occurs there with other partners.
"""

import random
from collections.abc import Callable
from typing import get_args

import datasets

from corpus.grammar import Grammar, Sentence, Split


def sentences(
    split: Split, size: int, seed: int = 0, wanted: Callable[[Sentence], bool] | None = None
) -> list[Sentence]:
    """Draw distinct sentences of one split, with the (subject noun, verb) pairs they hold.

    Args:
        split: "train", "validation" or "test".
        size: Number of sentences, at least 1. A smaller size gives the first sentences of a larger one.
        seed: Seed of the choices; the same arguments give the same sentences everywhere.
        wanted: Returns whether to keep a sentence; by default all are kept.

    Returns:
        The sentences in the order drawn; no two share their English or their German side.

    Raises:
        ValueError: Unknown split, size below 1, or more sentences than the split is found to hold.
    """
    if split not in get_args(Split):
        raise ValueError(f"split is {split!r}; choose one of {', '.join(get_args(Split))}")
    if size < 1:
        raise ValueError(f"size is {size}; ask for at least 1 sentence")
    grammar = Grammar(split, random.Random(f"{split} {seed}"))
    found: list[Sentence] = []
    seen: set[str] = set()
    misses = 0
    while len(found) < size:
        sentence = grammar.sentence()
        unwanted = sentence is None or (wanted is not None and not wanted(sentence))
        if unwanted or sentence.en in seen or sentence.de in seen:
            misses += 1
            if misses > 1000 + 20 * size:
                raise ValueError(f"split {split!r} gave only {len(found)} of {size} sentences; lower the size")
            continue
        seen.update((sentence.en, sentence.de))
        found.append(sentence)
    return found


def generate(split: Split, size: int, seed: int = 0) -> list[dict[str, str]]:
    """Return what `sentences` draws as pairs {"en": ..., "de": ...}, sentences of 5 to 20 words."""
    return [{"en": sentence.en, "de": sentence.de} for sentence in sentences(split, size, seed)]


def load(
    train_size: int = 10_000, validation_size: int = 500, test_size: int = 500, seed: int = 0
) -> datasets.DatasetDict:
    """Return the corpus as a dataset with the splits train, validation and test, and the columns en and de."""
    sizes: dict[Split, int] = {"train": train_size, "validation": validation_size, "test": test_size}
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_list(generate(split, size, seed)) for split, size in sizes.items()}
    )
