"""What the attached forwards do: those of the model, of its preconditioned layers and of the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_fngd import compiled
from hf_fngd.attach import Attachment
from hf_fngd.backward import ON_TOP_OF_ANOTHER, USED_ELSEWHERE, LayerSlot, MicroBatch, call_layer, in_backward
from hf_fngd.environment import refuse_replica, refuse_split_weight
from hf_fngd.graph import uses_of_leaves
from hf_fngd.inputs import find_sample
from hf_fngd.rest import RestSlot, call_head, inspect_rest, weigh_output
from hf_fngd.selection import Selected
from hf_fngd.sharing import INDEX_COLUMN
from hf_fngd.window import Window


class Forwards:
    """Sends the training forward passes of a model through the functions of `hf_fngd.backward` and `hf_fngd.rest`.

    The model's forward begins a micro-batch, the modules' find it in here; in a graph of torch.compile they find its
    number (`hf_fngd.compiled`). All other forward passes are the modules' own.

    Args:
        model: the module that is called with the batch.
        layers: the preconditioned layers.
        slots: what is known of each of them.
        rest: the slots of the embeddings, convolutions and tied heads.
        window: the micro-batches of the step under way.
        begin: what a training forward pass begins with; takes the number of samples N, and the dataset indices of the
            samples or None.

    Attributes:
        batch: the micro-batch of the last training forward pass; None where it has none, or was closed.

    Raises:
        RuntimeError: the model, or a module of it, cannot be attached to.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Selected],
        slots: list[LayerSlot],
        rest: list[RestSlot],
        window: Window,
        begin: Callable[[int, Tensor | None], MicroBatch],
    ) -> None:
        self.slots, self.rest = slots, rest
        self.batch: MicroBatch | None = None
        self._layers, self._window, self._begin = layers, window, begin
        self._engine = compiled.register(self)
        self._number: Tensor | None = None
        self._inspected = False
        self._inside = False
        handlers = [
            (layer.module, partial(self._layer_forward, slot)) for layer, slot in zip(layers, slots, strict=True)
        ]
        handlers += [(slot.module, partial(self._rest_forward, slot)) for slot in rest]
        self._attachment = Attachment(model, self._model_forward, handlers)

    def detach(self) -> None:
        """Give the forwards back."""
        self.batch = None
        self._attachment.undo()

    def begin(self, size: int, index: Tensor | None) -> MicroBatch:
        """A training forward pass begins, in a graph of torch.compile or outside of one."""
        # Also for layers outside of a graph that began in one.
        self.batch = self._begin(size, index)
        return self.batch

    def _layer_forward(
        self, slot: LayerSlot, module: nn.Module, own: Callable[..., Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        x = _trained_on(module, args, kwargs)
        if x is None:
            return own(*args, **kwargs)
        if torch.compiler.is_compiling():
            number = self._number
            if number is None:
                return own(x)
            return compiled.call_layer(module, x, slot.kernel, slot.layer, number, self._engine)
        batch = self.batch
        if batch is None:
            return own(x)
        weight = module.weight
        assert isinstance(weight, Tensor)
        refuse_split_weight(weight)
        if in_backward() and not batch.recomputed and self._window.mixed_up(slot.layer):
            slot.fallbacks.add(ON_TOP_OF_ANOTHER)
            return own(x)
        return call_layer(module, x, slot, batch)

    def _rest_forward(
        self, slot: RestSlot, module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        x = _trained_on(module, args, kwargs)
        if x is None or (slot.kernel is not None and x.dim() < 2):
            return own(*args, **kwargs)
        if torch.compiler.is_compiling():
            number = self._number
            if number is None:
                return own(*args, **kwargs)
            if slot.kernel is not None:
                return compiled.call_layer(module, x, slot.kernel, slot.place, number, self._engine)
            y = own(*args, **kwargs)
            if not isinstance(y, Tensor) or not slot.takes(x):
                return y
            return compiled.weigh_output(y, slot.input_norms(x), slot.place, number, self._engine)
        batch, recomputes = self.batch, in_backward()
        if not (self._inside or recomputes):  # whose batch it is, nobody knows
            slot.fallbacks.add(USED_ELSEWHERE)
        if batch is None or USED_ELSEWHERE in slot.fallbacks:
            return own(*args, **kwargs)
        if recomputes and not batch.recomputed and self._window.mixed_up(slot.place):
            slot.fallbacks.add(ON_TOP_OF_ANOTHER)
            return own(*args, **kwargs)
        if not recomputes:
            batch.calls[slot.place] += 1
        if slot.kernel is not None:
            return call_head(slot, x, batch)
        y = own(*args, **kwargs)
        return weigh_output(y, x, slot, batch) if isinstance(y, Tensor) and slot.takes(x) else y

    def _model_forward(self, module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        index = kwargs.pop(INDEX_COLUMN, None)
        if not (module.training and torch.is_grad_enabled()):
            return own(*args, **kwargs)
        refuse_replica(module)
        sample = find_sample(args, kwargs)
        if torch.compiler.is_compiling():
            self._number = None if sample is None else torch.ops.hf_fngd.begin(sample, index, self._engine)
            return own(*args, **kwargs)
        batch = self.batch = None if sample is None else self.begin(len(sample), index)
        # For layers that are compiled by themselves.
        self._number = None if batch is None else compiled.number(batch)
        self._inside = True
        try:
            output = own(*args, **kwargs)
        finally:
            self._inside = False
        if batch is not None and not self._inspected:
            self._inspect(output, batch)
        return output

    def _inspect(self, output: Any, batch: MicroBatch) -> None:
        """Look through the first graph for weights that are used outside of their layers' forward."""
        self._inspected = True
        uses = uses_of_leaves(output)
        for layer, slot in zip(self._layers, self.slots, strict=True):
            calls = max(batch.calls[slot.layer], 1)  # those of a compiled layer are not counted
            slot.used_elsewhere = any(uses[id(p)] > calls for p in layer.module.parameters(recurse=False))
        inspect_rest(self.rest, uses, batch)


def _trained_on(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The argument of a forward pass that trains the module's weight; None where it does not, or has others."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if not module.training or not torch.is_grad_enabled() or not weight.requires_grad or len(args) + len(kwargs) != 1:
        return None
    x: Tensor
    (x,) = (*args, *kwargs.values())
    return x
