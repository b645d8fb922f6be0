"""Reading an autograd graph."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

_DEPTH = 8  # how deep containers and objects are followed

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
    for current in _nodes(_ends(output)):
        for node, _ in current.next_functions:
            if node in nodes:
                # The shape is that of the gradient that it is given.
                consumers[node].append((current.name(), tuple(current._input_metadata[0].shape)))
            if hasattr(node, "variable"):
                leaves[id(node.variable)] += 1
    return leaves, consumers


def before_batch_norms(output: Any, scales: Collection[int], any_mode: bool = False) -> tuple[set[int], set[int]]:
    """The nearest layers before each BatchNorm in training mode, or (``any_mode``) in any.

    Args:
        output: as of `uses_in_graph`.
        scales: the ``id`` of the BatchNorms' scales. An operation that reads one is a BatchNorm or, as a compiled
            block, holds one.
        any_mode: whether BatchNorms in evaluation mode count.

    Returns:
        The layers' places, and the ``id`` of the leaves in front of them, as of layers in a compiled block.
    """
    inputs = [
        one
        for norm in _batch_norms(output, scales, any_mode)
        for one in _inputs(norm)[: 1 if _is_batch_norm(norm) else None]
    ]
    found = [*_nodes(inputs, until=_is_layer)]
    return {_place(node) for node in found} - {-1}, {id(node.variable) for node in found if hasattr(node, "variable")}


def behind_batch_norms(
    output: Any, weighed: Collection[int], scales: Collection[int], any_mode: bool = False
) -> set[int]:
    """The places of layers behind the last BatchNorms: the first ones on each way from there to the output.

    Args:
        output: as of `uses_in_graph`.
        weighed: the places of the layers that count.
        scales: as of `before_batch_norms`.
        any_mode: as of `before_batch_norms`.
    """
    norms = set(_batch_norms(output, scales, any_mode))
    coupled = set(_nodes(norms))
    behind = dict[Any, int]()

    def counts(node: Any) -> bool:
        return _place(node) in weighed and node not in coupled

    for node in _nodes(_ends(output)) if norms else ():
        if counts(node) and not norms.isdisjoint(_nodes(_inputs(node), until=counts)):
            behind[node] = _place(node)
    for node in [*behind]:  # a shortcut may lead around a layer to one that is nearer to the output
        for one in _nodes(_inputs(node)):
            behind.pop(one, None)
    return {*behind.values()}


def _batch_norms(output: Any, scales: Collection[int], any_mode: bool) -> list[Any]:
    return [node for node in _nodes(_ends(output)) if _couples(node, scales, any_mode)]


def _couples(node: Any, scales: Collection[int], any_mode: bool) -> bool:
    if not _is_batch_norm(node):
        return any(id(one.variable) in scales for one in _inputs(node) if hasattr(one, "variable"))
    trains = any_mode or bool(getattr(node, "_saved_training", True))
    return trains and node._input_metadata[0].shape[0] != 1  # an InstanceNorm is one on a batch of one


def _is_batch_norm(node: Any) -> bool:
    return "BatchNorm" in node.name()


def _place(node: Any) -> int:
    """The place of the layer whose operation it is; -1 for any other operation."""
    place = getattr(node, "place", None)
    return place if isinstance(place, int) else -1


def _is_layer(node: Any) -> bool:
    return _place(node) >= 0


def _ends(output: Any) -> list[Any]:
    return [tensor.grad_fn for tensor in _tensors(output) if tensor.grad_fn is not None]


def _inputs(node: Any) -> list[Any]:
    return [one for one, _ in node.next_functions if one is not None]


def _nodes(begin: Iterable[Any], until: Callable[[Any], bool] = lambda _: False) -> Iterator[Any]:
    """Every operation behind these, once, they included; none behind one for which ``until`` holds."""
    stack = list(dict.fromkeys(begin))
    seen = set(stack)
    while stack:
        current = stack.pop()
        yield current
        if not until(current):
            found = set(_inputs(current)) - seen
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
