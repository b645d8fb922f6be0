"""Training batches of like lengths, in random order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class ShuffledLengthGroups(Sampler[int]):
    """Groups rows by length, and shuffles the groups.

    Trainer's own `group_by_length` leaves its groups sorted, so that every 50 batches run from the longest sentences
    to the shortest: each epoch ends on the shortest, and so do the translations of a model evaluated there.

    The order depends on seed and epoch alone: it is the same on every process and after resuming.

    Args:
        lengths: Length of each row.
        batch_size: Rows of a group: those of one optimizer step, on all processes.
        seed: Seed of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; accelerate calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        rows = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        whole = len(rows) // self.batch_size
        for group in torch.randperm(whole, generator=generator).tolist():
            yield from rows[group * self.batch_size : (group + 1) * self.batch_size]
        yield from rows[whole * self.batch_size :]
