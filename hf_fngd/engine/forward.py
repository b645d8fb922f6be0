"""What the attached forwards do: that of the model begins a micro-batch, those of its layers find it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_fngd.distributed import refuse_replica, refuse_split_weight
from hf_fngd.engine.attach import Attachment
from hf_fngd.engine.backward import Engine, LayerCall, begin, numbered
from hf_fngd.engine.graph import uses_in_graph
from hf_fngd.engine.inputs import find_sample
from hf_fngd.engine.layer import ON_TOP_OF_ANOTHER, USED_ELSEWHERE, Layer
from hf_fngd.engine.window import MicroBatch, Window, in_backward
from hf_fngd.layers.embedding import EmbeddingKernel


class Forwards:
    """Sends the training forward passes of a model through its layers' kernels.

    All other forward passes are the modules' own.

    Args:
        model: the module that is called with the batch.
        layers: the attached layers.
        window: the micro-batches of the step under way.
        opened: what a training forward pass of N samples begins with.

    Attributes:
        batch: the micro-batch of the last training forward pass; None where it has none, or was closed.

    Raises:
        RuntimeError: the model, or a module of it, cannot be attached to.
    """

    def __init__(
        self, model: nn.Module, layers: list[Layer], window: Window, opened: Callable[[int], MicroBatch]
    ) -> None:
        self.batch: MicroBatch | None = None
        self._layers, self._window, self._opened = layers, window, opened
        self._engine = Engine(layers, self.begin)
        self._number: Tensor | None = None
        self._inspected = False
        self._inside = False
        handlers = [(layer.module, partial(self._layer_forward, layer)) for layer in layers]
        self._attachment = Attachment(model, self._model_forward, handlers)

    def detach(self) -> None:
        """Give the forwards back."""
        self.batch = None
        self._attachment.undo()

    def begin(self, size: int) -> MicroBatch:
        """A training forward pass begins, in a graph of torch.compile or outside of one."""
        # Also for layers outside of a graph that began in one.
        self.batch = self._opened(size)
        return self.batch

    def _model_forward(self, module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not (module.training and torch.is_grad_enabled()):
            return own(*args, **kwargs)
        refuse_replica(module)
        sample = find_sample(args, kwargs)
        if torch.compiler.is_compiling():
            self._number = None if sample is None else begin(sample, self._engine.number)
            return own(*args, **kwargs)
        batch = self.batch = None if sample is None else self.begin(len(sample))
        # For layers that are compiled by themselves.
        self._number = None if batch is None else numbered(batch)
        self._inside = True
        try:
            output = own(*args, **kwargs)
        finally:
            self._inside = False
        if batch is not None and not self._inspected:
            self._inspect(output, batch)
        return output

    def _layer_forward(
        self, layer: Layer, module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        x = _trained_on(module, args, kwargs)
        if x is None or not layer.kernel.takes(x):
            return own(*args, **kwargs)
        if torch.compiler.is_compiling():
            number = self._number
            if number is None:
                return own(x)
            call = LayerCall(layer.kernel, layer.place, number, self._engine.number, None)
            return layer.kernel.run(module, own, x, call)
        recomputes = in_backward()
        if not (layer.selected.matrix or self._inside or recomputes):  # which batch it belongs to is not known
            layer.shared.reasons.add(USED_ELSEWHERE)
        batch = self.batch
        if batch is None or USED_ELSEWHERE in layer.shared.reasons:
            return own(x)
        refuse_split_weight(module.weight)
        if recomputes and not batch.recomputed and self._window.mixed_up(layer.place):
            layer.shared.reasons.add(ON_TOP_OF_ANOTHER)
            return own(x)
        # A recomputation under activation checkpointing runs inside a backward pass and is no call of its own.
        if not recomputes:
            batch.calls[layer.place] += 1
        return layer.kernel.run(module, own, x, LayerCall(layer, layer.place, batch, self._engine.number, batch.size))

    def _inspect(self, output: Any, batch: MicroBatch) -> None:
        """Look through the first graph for weights that are used outside of their layers' forward."""
        self._inspected = True
        tables = [layer.kernel for layer in self._layers if isinstance(layer.kernel, EmbeddingKernel)]
        uses = uses_in_graph(output, {table.output for table in tables if table.output is not None})
        for table in tables:
            if table.output is not None:
                table.inspect(uses.consumers[table.output])
        calls = Counter[int]()
        for layer in self._layers:
            for parameter in layer.module.parameters(recurse=False):
                calls[id(parameter)] += batch.calls[layer.place]
        for layer in self._layers:
            # Calls of a layer that is compiled by itself are not counted.
            own = [id(parameter) for parameter in layer.module.parameters(recurse=False)]
            if any(uses.leaves[key] > max(calls[key], int(layer.selected.matrix)) for key in own):
                layer.shared.reasons.add(USED_ELSEWHERE)


def _trained_on(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The argument of a forward pass that trains the module's weight; None where it does not, or has others."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if not module.training or not torch.is_grad_enabled() or not weight.requires_grad or len(args) + len(kwargs) != 1:
        return None
    (x,) = (*args, *kwargs.values())
    return x
