"""A rehearsal: the first batch of a compiled model runs eagerly as well, before it runs compiled.

Only an eager pass shows where the samples are, and which weights are used outside their layers' forward. An operator in
a compiled graph takes tensors, integers and constants only. So the model's arguments are taken apart into these, and a
text says how they belong together.
"""

import ast
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import DispatchKey

from hf_fngd.samples.snapshot import untouched

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Rehearsal(NamedTuple):
    """What a rehearsal needs. ``arguments`` is None if they could not be packed, ``autocast`` if it is off."""

    arguments: Arguments | None
    autocast: torch.dtype | None
    device_type: str


Packed = tuple[str, list[Tensor], list[int]]
_DEPTH = 5  # of containers within each other

# Within a compiled graph's operator these are excluded, and without them no autograd graph is built.
_AUTOGRAD = [
    getattr(DispatchKey, name)
    for name in ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView")
    if hasattr(DispatchKey, name)
]


def packed(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Packed:
    """Take a model's arguments apart for an operator; the text is empty where an argument cannot be packed."""
    tensors: list[Tensor] = []
    integers: list[int] = []
    text = _text((list(args), dict(kwargs)), tensors, integers, 0)
    return ("", [], []) if text is None else (text, tensors, integers)


def _text(value: Any, tensors: list[Tensor], integers: list[int], depth: int) -> str | None:
    # No strings: each new string would cause a recompilation.
    kind = type(value)
    if value is None or kind is bool:
        return f"('is', {value!r})"
    if kind is int:  # not written into the text, for the same reason
        if not -(2**63) <= value < 2**63:
            return None
        integers.append(value)
        return "('int',)"
    if kind in (Tensor, nn.Parameter) and not value.is_nested and value.layout == torch.strided:
        tensors.append(value.detach())
        return "('tensor',)"
    if kind not in (list, tuple, dict) or depth > _DEPTH:
        return None
    inside = []
    for one in value.values() if kind is dict else value:
        text = _text(one, tensors, integers, depth + 1)
        if text is None:
            return None
        inside.append(text + ",")
    if kind is not dict:
        return f"('{'tuple' if kind is tuple else 'list'}', ({''.join(inside)}))"
    for key in value:
        if type(key) is not str:
            return None
    keys = "".join([f"{key!r}," for key in value])
    return f"('dict', ({keys}), ({''.join(inside)}))"


def unpacked(text: str, tensors: Sequence[Tensor], integers: Sequence[int]) -> Arguments | None:
    """The inverse of `packed`; None where an argument could not be packed."""
    if not text:
        return None
    found = _value(ast.literal_eval(text), iter(tensors), iter(integers))
    return tuple(found[0]), found[1]


def _value(form: tuple[Any, ...], tensors: Iterator[Tensor], integers: Iterator[int]) -> Any:
    kind, *inside = form
    if kind == "is":
        return inside[0]
    if kind in ("int", "tensor"):
        return next(integers if kind == "int" else tensors)
    values = [_value(one, tensors, integers) for one in inside[-1]]
    if kind == "dict":
        return dict(zip(inside[0], values, strict=True))
    return tuple(values) if kind == "tuple" else values


def _drop(_: Any) -> Any:
    """Save nothing: no backward pass will go through this graph."""


@contextlib.contextmanager
def rehearsing(model: nn.Module, rehearsal: Rehearsal) -> Iterator[None]:
    """Within an operator of a compiled graph: let a model run in eval mode and build an autograd graph.

    Afterwards the model is what it was (see `untouched`). Eval mode, since a training forward may change parameters, as
    a momentum encoder's does. No activation is kept.
    """
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD:
        excluded = excluded.remove(key)
    with (
        torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded),
        untouched(model),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(_drop, _drop),
        torch.autocast(rehearsal.device_type, rehearsal.autocast, enabled=rehearsal.autocast is not None),
    ):
        yield
