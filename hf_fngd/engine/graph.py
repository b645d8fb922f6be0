"""Reading an autograd graph."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from torch import Tensor


@dataclass
class Uses:
    """What the operations of a graph read.

    Attributes:
        leaves: how many operations read each leaf, by ``id`` of the leaf.
        consumers: the operations that read the output of each node that was asked for, by name, and the first
            dimension of what they make.
    """

    leaves: Counter[int] = field(default_factory=Counter)
    consumers: dict[Any, list[tuple[str, int]]] = field(default_factory=lambda: defaultdict(list))


def uses_in_graph(output: Any, nodes: Collection[Any] = ()) -> Uses:
    """Walk through the graph behind an output.

    Args:
        output: a tensor, or mappings, sequences and dataclasses of them; whatever else they hold is passed over.
        nodes: nodes of the graph whose consumers are asked for.
    """
    stack = [tensor.grad_fn for tensor in _tensors(output) if tensor.grad_fn is not None]
    seen, uses = set(stack), Uses()
    while stack:
        current = stack.pop()
        for node, _ in current.next_functions:
            if node is None:
                continue
            if node in nodes:
                shape = current._input_metadata[0].shape  # of the gradient that it is given
                uses.consumers[node].append((current.name(), shape[0] if shape else 0))
            if hasattr(node, "variable"):
                uses.leaves[id(node.variable)] += 1
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
