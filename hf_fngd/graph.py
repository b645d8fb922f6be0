"""Reading an autograd graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def uses_of_leaves(output: Any) -> Counter[int]:
    """How many operations of a graph read each leaf.

    Args:
        output: a tensor, or mappings, sequences and dataclasses of them; whatever else they hold is passed over.

    Returns:
        Counts by ``id`` of the leaf.
    """
    stack = [tensor.grad_fn for tensor in _tensors(output) if tensor.grad_fn is not None]
    seen, uses = set(stack), Counter[int]()
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None:
                continue
            if hasattr(node, "variable"):
                uses[id(node.variable)] += 1
            elif node not in seen:
                seen.add(node)
                stack.append(node)
    return uses


def _tensors(output: Any) -> Iterator[Tensor]:
    stack, seen = [output], set[int]()
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            yield value
        elif id(value) not in seen:  # dataclasses may refer to each other
            seen.add(id(value))
            if isinstance(value, Mapping):
                stack += value.values()
            elif isinstance(value, list | tuple):
                stack += value
            elif is_dataclass(value):
                stack += [getattr(value, field.name, None) for field in fields(value)]
