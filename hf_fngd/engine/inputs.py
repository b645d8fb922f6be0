"""How many samples a training batch has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

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
