"""Reading an autograd graph."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

Consumers = dict[Any, list[tuple[str, int]]]


def uses_in_graph(output: Any, nodes: Collection[Any] = ()) -> tuple[Counter[int], Consumers]:
    """Which operations of an autograd graph read what.

    Args:
        output: tensors, in mappings, sequences and dataclasses; the graph is the one behind them.
        nodes: nodes of the graph whose readers are wanted.

    Returns:
        How many operations read each leaf, by the leaf's ``id``; and for each of the nodes the names of the operations
        that read its output, with the first dimension of what each of them makes.
    """
    stack = [tensor.grad_fn for tensor in _tensors(output) if tensor.grad_fn is not None]
    seen, leaves, consumers = set(stack), Counter[int](), defaultdict[Any, list[tuple[str, int]]](list)
    while stack:
        current = stack.pop()
        for node, _ in current.next_functions:
            if node is None:
                continue
            if node in nodes:
                shape = current._input_metadata[0].shape  # of the gradient that it is given
                consumers[node].append((current.name(), shape[0] if shape else 0))
            if hasattr(node, "variable"):
                leaves[id(node.variable)] += 1
            elif node not in seen:
                seen.add(node)
                stack.append(node)
    return leaves, consumers


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
