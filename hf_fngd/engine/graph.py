"""Reading an autograd graph."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

_DEPTH = 8  # how deep containers and objects are followed

# Operations that change the shape or the dtype of a tensor alone.
_SHAPES = {
    *("ViewBackward", "ReshapeBackward", "UnsafeViewBackward", "TBackward", "TransposeBackward", "PermuteBackward"),
    *("SqueezeBackward", "UnsqueezeBackward", "ToCopyBackward"),
}

Consumers = dict[Any, list[tuple[str, tuple[int, ...]]]]


def uses_in_graph(output: Any, nodes: Collection[Any] = ()) -> tuple[Counter[int], Consumers]:
    """Which operations of an autograd graph read what.

    Args:
        output: tensors, in mappings, sequences and objects; the graph is the one behind them.
        nodes: nodes of the graph whose readers are wanted.

    Returns:
        How many operations read each leaf, by the leaf's ``id``; and for each of the nodes the names of the operations
        that read its output, with the shape of what each of them makes.
    """
    leaves, consumers = Counter[int](), defaultdict[Any, list[tuple[str, tuple[int, ...]]]](list)
    for current in _nodes(output):
        for node, _ in current.next_functions:
            if node in nodes:
                # The shape is that of the gradient that it is given.
                consumers[node].append((current.name(), tuple(current._input_metadata[0].shape)))
            if hasattr(node, "variable"):
                leaves[id(node.variable)] += 1
    return leaves, consumers


def before_batch_norms(output: Any, any_mode: bool = False) -> set[int]:
    """The places of weighed layers whose output a BatchNorm reads, in training mode or (``any_mode``) in any."""
    places = set[int]()
    for current in _nodes(output):
        couples = "BatchNorm" in current.name() and (any_mode or getattr(current, "_saved_training", True))
        if couples and current._input_metadata[0].shape[0] != 1:  # an InstanceNorm is one on a batch of one
            node = current.next_functions[0][0]
            while node is not None and node.name().rstrip("0123456789") in _SHAPES:
                node = node.next_functions[0][0]
            if isinstance(place := getattr(node, "place", None), int):
                places.add(place)
    return places


def _nodes(output: Any) -> Iterator[Any]:
    """Every operation of the graph, once."""
    stack = [tensor.grad_fn for tensor in _tensors(output) if tensor.grad_fn is not None]
    seen = set(stack)
    while stack:
        current = stack.pop()
        yield current
        found = {node for node, _ in current.next_functions if node is not None} - seen
        seen |= found
        stack += found


def _tensors(output: Any) -> Iterator[Tensor]:
    stack, seen = [(output, 0)], set[int]()
    while stack:
        value, depth = stack.pop()
        if isinstance(value, Tensor):
            yield value
        elif id(value) not in seen and depth <= _DEPTH and not isinstance(value, nn.Module | type | str | bytes):
            seen.add(id(value))  # objects may refer to each other
            if isinstance(value, Mapping):
                inside = [*value.values()]
            elif isinstance(value, list | tuple):
                inside = [*value]
            else:
                slots = [kind.__dict__.get("__slots__", ()) for kind in type(value).__mro__]
                names = [name for own in slots for name in ([own] if isinstance(own, str) else own)]
                inside = [*getattr(value, "__dict__", {}).values(), *(getattr(value, name, None) for name in names)]
            stack += [(one, depth + 1) for one in inside]
