"""Sentences and the subject of their main clause, from the grammar that made them: data to classify without a download.

"While a woman is sleeping, two men are reading a book." is about men: its label is man, one of the grammar's living
beings. In every sentence two of them do different things, and either may come first, so that the words alone do not
tell: the main clause has to be found.

All splits draw on the corpus's training split, and share no sentence. Its own validation and test splits hold subjects
that no verb of theirs has in training: a classifier learns from that to rule out the right answers.
"""

from __future__ import annotations

from itertools import islice

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from corpus import sentences
from corpus.grammar import Sentence
from corpus.words import SUBJECTS

LABELS = [noun.en for noun in SUBJECTS]
FEATURES = Features({"text": Value("string"), "label": ClassLabel(names=LABELS)})


def load(train_size: int = 10_000, validation_size: int = 2_000, test_size: int = 2_000, seed: int = 0) -> DatasetDict:
    """Return the splits train, validation and test, with the columns text and label.

    More training rows leave the other splits as they are.

    Raises:
        ValueError: A size is below 1, or the grammar does not make so many sentences.
    """
    sizes = {"validation": validation_size, "test": test_size, "train": train_size}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}_size is {size}; it must be at least 1.")
    drawn = iter(sentences("train", sum(sizes.values()), seed, wanted=has_two_doers))
    splits = DatasetDict()
    for name, size in sizes.items():
        rows = [{"text": sentence.en, "label": sentence.subject} for sentence in islice(drawn, size)]
        splits[name] = Dataset.from_list(rows, features=FEATURES)
    return splits


def has_two_doers(sentence: Sentence) -> bool:
    """Return whether two living beings do different things, each alone."""
    nouns, verbs = (set(names) for names in zip(*sentence.pairs, strict=True))
    return len(nouns) == len(verbs) == len(sentence.pairs) == 2
