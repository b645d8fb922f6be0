"""A model's inputs: copies of them, and the same ones for a batch of another size."""

import copy
from collections import UserDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import Tensor

from hf_fngd.samples.batch import holds_batches

_PLAIN = (int, float, complex, str, bytes, torch.dtype, torch.device)


class CannotProbeError(Exception):
    """The inputs have a structure that the probe does not know, or are not finite."""


def copied(value: Any) -> Any:
    """Copy a model's inputs, which a forward pass may change: tensors and containers are new, all else is shared."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, list):
        return [copied(one) for one in value]
    if isinstance(value, tuple):
        items = [copied(one) for one in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, UserDict):  # BatchEncoding
        encoding = copy.copy(value)
        encoding.data = copied(value.data)
        return encoding
    if isinstance(value, Mapping):
        entries = {key: copied(one) for key, one in value.items()}
        return entries if type(value) is dict else type(value)(**entries)
    if is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)
        for field in fields(value):
            if hasattr(value, field.name):
                object.__setattr__(made, field.name, copied(getattr(value, field.name)))
        return made
    return value


def sizes_of(value: Any, samples: int, dim: int, key: str = "") -> dict[str, frozenset[int]]:
    """How many entries each input has for a sample, over its first dimensions: ``{T, T i}`` for ``[N, T, i]``.

    Counts the tensors that `resized` would change.
    """
    if isinstance(value, Tensor):
        for own in dict.fromkeys((dim, 0)):
            if value.dim() > own and value.shape[own] == samples:
                others = [*value.shape[:own], *value.shape[own + 1 :]]
                return {key: frozenset(accumulate(others, mul))}
        return {}
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple) and not _of_samples(value, samples):
        items = enumerate(value)
    elif is_dataclass(value) and not isinstance(value, type):
        items = ((field.name, getattr(value, field.name, None)) for field in fields(value))
    return {path: size for name, one in items for path, size in sizes_of(one, samples, dim, f"{key}.{name}").items()}


def resized(value: Any, samples: int, dim: int, reverse: bool = False) -> Any:
    """The inputs without their first sample, the others in order or in reverse; a single sample is doubled.

    A tensor holds samples if dimension ``dim`` has ``samples`` entries, or else if dimension 0 has; a list, if it has
    ``samples`` items that hold none themselves, or as many dictionaries or other objects. All else stays as it is.

    Raises CannotProbeError at an object of another kind, which may hold samples unseen.
    """
    if isinstance(value, Tensor):
        for own in dict.fromkeys((dim, 0)):
            if value.dim() > own and value.shape[own] == samples:
                others = torch.cat([value, value], own) if samples == 1 else value.narrow(own, 1, samples - 1)
                return others.flip(own) if reverse else others
        return value
    if value is None or isinstance(value, _PLAIN):
        return value
    if isinstance(value, list | tuple):
        return _resized_sequence(value, samples, dim, reverse)
    if isinstance(value, Mapping):
        items = {key: resized(one, samples, dim, reverse) for key, one in value.items()}
        if isinstance(value, UserDict):  # BatchEncoding
            encoding = copy.copy(value)
            encoding.data = items
            return encoding
        return items if type(value) is dict else type(value)(**items)
    if is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)
        for field in fields(value):
            if hasattr(value, field.name):
                object.__setattr__(made, field.name, resized(getattr(value, field.name), samples, dim, reverse))
        return made
    raise CannotProbeError(f"an input is of type {type(value).__name__}")


def _of_samples(value: Sequence[Any], samples: int) -> bool:
    """Whether a sequence has one object for each sample, such as a dictionary of its labels or an image."""
    if len(value) != samples or holds_batches(value):
        return False
    return not any(one is None or isinstance(one, (Tensor, list, tuple, *_PLAIN)) for one in value)


def _resized_sequence(value: Sequence[Any], samples: int, dim: int, reverse: bool) -> Any:
    own = _of_samples(value, samples)
    items = list(value) if own else [resized(one, samples, dim, reverse) for one in value]
    if own and samples == 1:
        items *= 2
    elif own or (len(value) == samples > 1 and all(a is b for a, b in zip(items, value, strict=True))):
        items = items[:0:-1] if reverse else items[1:]
    if isinstance(value, list):
        return items
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
