"""Questions about sentences, answered by the grammar that made them: data to classify without a download.

A text is a question and a sentence, "Who is reading? While a woman is sleeping, a man is reading a book."; its label is
who does it, one of the grammar's living beings. In every sentence two of them do different things, so that the words
alone do not tell: the verb has to be found, and its subject. No verb and subject that meet in a validation or test
sentence meet in training (see `translation.corpus`). The question leaves out the verb's object ("Who is following?").
"""

from __future__ import annotations

import random
from typing import get_args

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from translation.corpus import sentences
from translation.corpus.grammar import Sentence, Split
from translation.corpus.words import SUBJECTS

ANSWERS = [noun.en for noun in SUBJECTS]
FEATURES = Features({"text": Value("string"), "label": ClassLabel(names=ANSWERS)})


def load(train_size: int = 10_000, validation_size: int = 2_000, test_size: int = 2_000, seed: int = 0) -> DatasetDict:
    """Return the splits train, validation and test, with the columns text and label.

    Args:
        train_size: Number of training rows.
        validation_size: Number of validation rows.
        test_size: Number of test rows.
        seed: Seed of the sentences and of the questions.

    Raises:
        ValueError: A size is below 1, or a split does not hold so many sentences.
    """
    splits = {}
    for split, size in zip(get_args(Split), (train_size, validation_size, test_size), strict=True):
        rng = random.Random(f"questions {split} {seed}")
        rows = [ask(sentence, rng) for sentence in sentences(split, size, seed, wanted=has_two_doers)]
        splits[split] = Dataset.from_list(rows, features=FEATURES)
    return DatasetDict(splits)


def has_two_doers(sentence: Sentence) -> bool:
    """Return whether two living beings do different things, so that each verb of the sentence has one subject."""
    nouns, verbs = (set(names) for names in zip(*sentence.pairs, strict=True))
    return len(nouns) == len(verbs) == len(sentence.pairs) == 2


def ask(sentence: Sentence, rng: random.Random) -> dict[str, str]:
    """Ask who does one of the things that a sentence tells of."""
    noun, verb = rng.choice(sorted(sentence.pairs))
    return {"text": f"Who is {verb}? {sentence.en}", "label": noun}
