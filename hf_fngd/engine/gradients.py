"""Whether the gradients of the layers' weights are there, and still the same."""

import weakref
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from hf_fngd.distributed.sharded import is_sharded, local
from hf_fngd.engine.layer import Layer
from hf_fngd.layers.modules import weight_of


class Gradients:
    """The gradients of layers at one moment; the first one that there is tells for all whether they were changed."""

    def __init__(self) -> None:
        self._first: tuple[weakref.ref[Tensor], int] | None = None  # and its version

    def note(self, layers: Iterable[Layer]) -> None:
        """Remember them as they are now."""
        grad = next(_gradients(layers), None)
        self._first = None if grad is None else (weakref.ref(grad), grad._version)

    def unchanged(self, layers: Iterable[Layer]) -> bool:
        """Whether there are gradients, and those that were noted; False where none were."""
        grad = next(_gradients(layers), None)
        return grad is not None and self._is_first(grad)

    def _is_first(self, grad: Tensor) -> bool:
        return self._first is not None and self._first[0]() is grad and self._first[1] == grad._version

    def are_there(self, layers: Sequence[Layer]) -> bool:
        """Whether any weight has a gradient. One that is sharded, or computed from others, counts as having one.

        Gradients that were noted, and have become zero since, were zeroed in place: then there are none. To see that,
        the host waits for the device where they were changed.
        """
        grad = next(_gradients(layers), None)
        if grad is not None and (self._first is None or self._is_first(grad)):
            return True  # the common case, in no time
        weights = (weight_of(layer.selected.module) for layer in layers)
        if any(isinstance(w, Tensor) and (is_sharded(w) or not w.is_leaf) for w in weights):
            return True
        return any(bool(local(grad).any()) for grad in _gradients(layers))


def _gradients(layers: Iterable[Layer]) -> Iterator[Tensor]:
    weights = (weight_of(layer.selected.module) for layer in layers)
    return (w.grad for w in weights if w is not None and w.is_leaf and w.grad is not None)
