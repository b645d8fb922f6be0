"""Bad samples as they come: a share of the training texts is spoiled, in one of several ways."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from datasets import Dataset

import corpus
from common.arguments import option

_BOILERPLATE = "This message was sent from an address that cannot receive mail. Please do not reply to it."


@dataclass
class BadSampleArguments:
    """How many training rows are spoiled, and how."""

    bad_samples: float = option(0.0, "Share of the training rows that are spoiled, drawn with the seed.")
    bad_kind: str | None = option(
        None,
        "How: garbled (letters in random order), truncated (one word is left), boilerplate (one text for all), "
        "language (German sentences), shifted (the label of the next class).",
        choices=["garbled", "truncated", "boilerplate", "language", "shifted"],
    )

    def __post_init__(self) -> None:
        """Reject values that no run can use."""
        if not 0 <= self.bad_samples <= 1:
            raise ValueError(f"bad_samples is {self.bad_samples}; it must lie in [0, 1].")
        if (self.bad_samples > 0) != (self.bad_kind is not None):
            raise ValueError("--bad_samples and --bad_kind need each other: how many rows are spoiled, and how.")

    @property
    def spoiling(self) -> str:
        """What is spoiled, in words; empty where nothing is."""
        return f"{self.bad_samples:.3g} of them {self.bad_kind}" if self.bad_samples else ""


def spoiled(rows: Dataset, arguments: BadSampleArguments, classes: int, seed: int) -> Dataset:
    """Return training rows, columns text and labels, of which some are spoiled; the others stay as they are.

    Args:
        rows: The rows.
        arguments: How many, and how.
        classes: The number of classes.
        seed: Of the choice of the rows.
    """
    if not arguments.bad_samples:
        return rows
    generator = random.Random(seed)
    places = generator.sample(range(len(rows)), round(arguments.bad_samples * len(rows)))
    texts, labels = list(rows["text"]), list(rows["labels"])
    if arguments.bad_kind == "shifted":
        for place in places:
            labels[place] = (labels[place] + 1) % classes
    else:
        others = iter(corpus.generate("train", max(1, len(places)), seed) if arguments.bad_kind == "language" else ())
        change: dict[str | None, Callable[[str], str]] = {
            "garbled": lambda text: "".join(generator.sample(text, len(text))),
            "truncated": lambda text: text.split()[0],
            "boilerplate": lambda text: _BOILERPLATE,
            "language": lambda text: next(others)["de"],
        }
        for place in places:
            texts[place] = change[arguments.bad_kind](texts[place])
    return Dataset.from_dict({"text": texts, "labels": labels})
