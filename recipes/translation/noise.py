"""Training pairs whose targets are wrong, on purpose."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from translation.arguments import DataArguments
from translation.data import LENGTH


@dataclass(frozen=True)
class Noise:
    """Which training pairs have a wrong target.

    Attributes:
        misaligned: Rows whose targets were permuted among themselves.
        random: Rows whose targets are random tokens.
        seed: The seed of both.
    """

    misaligned: list[int]
    random: list[int]
    seed: int

    @property
    def rows(self) -> list[int]:
        """The rows of both kinds."""
        return [*self.misaligned, *self.random]

    def report(self) -> dict[str, int]:
        """Return what all_results.json and the card hold; nothing where no target is wrong."""
        if not self.rows:
            return {}
        return {
            "misaligned_pairs": len(self.misaligned),
            "random_target_pairs": len(self.random),
            "noise_seed": self.seed,
        }


def add_noise(
    encoded: Dataset, tokenizer: PreTrainedTokenizerBase, arguments: DataArguments, seed: int
) -> tuple[Dataset, Noise]:
    """Give a share of the training pairs wrong targets.

    Works on tokens, so that the tokenizer is that of the clean texts at any share. The misaligned pairs are the same
    with and without random targets.

    Args:
        encoded: The tokenized training split.
        tokenizer: Its tokenizer.
        arguments: `misaligned`, `random_targets` and `noise_seed`.
        seed: Stands in for `noise_seed` where that is None.

    Returns:
        The split, itself where both shares are 0, and which of its rows are wrong.

    Raises:
        ValueError: A share above 0 is too small to be of any pair, or, misaligned, of two.
    """
    seed = seed if arguments.noise_seed is None else arguments.noise_seed
    counts = {
        "misaligned": _count("misaligned", arguments.misaligned, len(encoded), 2),
        "random_targets": _count("random_targets", arguments.random_targets, len(encoded), 1),
    }
    if not any(counts.values()):
        return encoded, Noise([], [], seed)
    order = np.random.default_rng([seed, 0]).permutation(len(encoded))
    misaligned, rest = order[: counts["misaligned"]], order[counts["misaligned"] :]
    generator = np.random.default_rng([seed, 1])
    replaced = generator.choice(rest, min(counts["random_targets"], len(rest)), replace=False)

    clean = list(encoded["labels"])
    labels = list(clean)
    for row, other in zip(misaligned, np.roll(misaligned, 1), strict=True):  # one random cycle: no target stays
        labels[row] = clean[other]
    words = [token for token in range(len(tokenizer)) if token not in tokenizer.all_special_ids]
    for row in replaced:
        labels[row] = [*generator.choice(words, len(clean[row]) - 1).tolist(), tokenizer.eos_token_id]
    lengths = [max(len(ids), len(target)) for ids, target in zip(encoded["input_ids"], labels, strict=True)]
    noisy = encoded.remove_columns(["labels", LENGTH]).add_column("labels", labels).add_column(LENGTH, lengths)
    return noisy, Noise(sorted(misaligned.tolist()), sorted(replaced.tolist()), seed)


def _count(name: str, share: float, pairs: int, least: int) -> int:
    count = round(share * pairs)
    if share > 0 and count < least:
        raise ValueError(
            f"{name}={share:g} of {pairs} training pairs is {count}; it takes {least} at least. Raise the share or the "
            "number of pairs, or leave it out."
        )
    return count
