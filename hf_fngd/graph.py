"""Reading an autograd graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def uses_of_leaves(output: Any) -> Counter[int]:
    """How many operations of a graph read each leaf.

    Args:
        output: a tensor, or mappings and sequences of them; whatever else they hold is passed over.

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


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
