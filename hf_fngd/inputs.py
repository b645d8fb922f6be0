"""What the engine reads from a training batch: how many samples it has, and which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_fngd.sharing import INDEX_COLUMN, SharingPolicy

# Where the batch is to be looked for among a model's inputs, before any other tensor.
_BATCH_KEYS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values")


def find_sample(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The input whose first dimension counts the samples; None where no input is a tensor with a dimension."""
    for key in _BATCH_KEYS:
        if isinstance(value := kwargs.get(key), Tensor) and value.dim() > 0:
            return value
    for value in (*args, *kwargs.values()):
        if isinstance(value, Mapping):
            if (found := find_sample((), value)) is not None:
                return found
        elif isinstance(value, Tensor) and value.dim() > 0:
            return value
    return None


def check_index(index: Tensor | None, size: int, policy: SharingPolicy) -> None:
    """Check the column of dataset indices of a batch of ``size`` samples.

    Raises:
        ValueError: the policy needs it and it is missing, or it is not one integer a sample.
    """
    if policy.needs_index and index is None:
        raise ValueError(
            f'sharing="{policy.name}" needs the column {INDEX_COLUMN!r} in every training batch: '
            "train on hf_fngd.add_index(dataset), with remove_unused_columns=False under Trainer"
        )
    if index is not None and (index.is_floating_point() or index.numel() != size):
        raise ValueError(
            f"the column {INDEX_COLUMN!r} has to hold one integer a sample: got {tuple(index.shape)} of "
            f"{index.dtype} for {size} samples; let hf_fngd.add_index(dataset) make it"
        )
