"""Find the batch among a model's inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

# Where the batch is to be looked for among a model's inputs, before any other tensor; and how many dimensions it has.
_BATCH_KEYS = {"input_ids": 2, "inputs_embeds": 3, "pixel_values": 4, "input_features": 3, "input_values": 2}


def find_sample(args: tuple[Any, ...], kwargs: Mapping[str, Any], depth: int = 4) -> Tensor | None:
    """The input whose first dimension counts the samples; None where no input is a tensor with a dimension.

    The search goes through mappings, lists, tuples and dataclasses, nested ones included. For a list of several
    mappings or dataclasses, one for each sample, an empty tensor stands. Mappings that hold batches, one for each
    column, as sentence-transformers gives its losses, are searched.
    """
    for key in _BATCH_KEYS:
        if isinstance(value := kwargs.get(key), Tensor) and not value.is_nested and value.dim() > 0:
            return value
    for value in (*args, *kwargs.values()) if depth else ():
        inside: Mapping[str, Any] = value if isinstance(value, Mapping) else {}
        if is_dataclass(value) and not isinstance(value, type):
            inside = {field.name: getattr(value, field.name, None) for field in fields(value)}
        items = tuple(value) if isinstance(value, list | tuple) else ()
        records = all(isinstance(one, Mapping) or is_dataclass(one) for one in items) and not holds_batches(items)
        if len(items) > 1 and records:
            return torch.empty(len(items), device="cpu")
        if (items or inside) and (found := find_sample(items, inside, depth - 1)) is not None:
            return found
        if isinstance(value, Tensor) and not value.is_nested and value.dim() > 0:
            return value
    return None


def requires_grad(value: Any, depth: int = 4) -> bool:
    """Whether a tensor among a model's inputs has a gradient; the search is that of `find_sample`."""
    if isinstance(value, Tensor):
        return value.requires_grad
    inside: Any = value if isinstance(value, list | tuple) else ()
    if isinstance(value, Mapping):
        inside = value.values()
    elif is_dataclass(value) and not isinstance(value, type):
        inside = [getattr(value, field.name, None) for field in fields(value)]
    return depth > 0 and any(requires_grad(one, depth - 1) for one in inside)


def holds_batches(items: Sequence[Any]) -> bool:
    """Whether each item is a mapping of a whole batch, and none of one sample."""

    def whole(one: Mapping[str, Any]) -> bool:
        tensors = ((one.get(key), dim) for key, dim in _BATCH_KEYS.items())
        return any(isinstance(value, Tensor) and value.dim() >= dim for value, dim in tensors)

    return len(items) > 0 and all(isinstance(one, Mapping) and whole(one) for one in items)
