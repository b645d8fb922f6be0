"""What the first training pass's autograd graph says about the layers."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_fngd.distributed.sharded import is_sharded
from hf_fngd.engine.coverage import listed
from hf_fngd.engine.graph import before_batch_norms, behind_batch_norms, uses_in_graph
from hf_fngd.engine.layer import Layer
from hf_fngd.engine.reasons import CLIPPED_BEHIND, COUPLED, USED_ELSEWHERE
from hf_fngd.engine.window import MicroBatch
from hf_fngd.layers.embedding import EmbeddingKernel

logger = logging.getLogger(__name__)


class Inspection:
    """Reads the graph of the first batch, and that of the first batch of several rows, if the first has one.

    It finds weights that are used outside their layers' forward, tables that are expanded over the batch, and, with
    ``weighs_behind``, layers whose output a BatchNorm reads, and those that clip in their place. ``norms`` has the
    model's BatchNorms by their names: without them no compiled graph passes sample weights on.

    Attributes:
        done: whether a graph was read. Set it to False to have the next one read too.
        hidden: the names of BatchNorms that train and are not in the graph.
    """

    def __init__(self, layers: Sequence[Layer], weighs_behind: bool, norms: Mapping[str, _BatchNorm]) -> None:
        self.done, self.hidden = False, list[str]()
        self._of_one = False  # whether that batch had one row, which shows no table of positions
        self._layers, self._weighs_behind, self._norms = layers, weighs_behind, norms
        self._tables = [layer.kernel for layer in layers if isinstance(layer.kernel, EmbeddingKernel)]

    def begin(self, batch: MicroBatch | None) -> bool:
        """Before a forward pass: whether its graph is to be read. The tables then keep what they return."""
        due = batch is not None and (not self.done or (self._of_one and batch.rows > 1))
        for table in self._tables if due else ():
            table.outputs = []
        return due

    def read(self, output: Any, batch: MicroBatch, rehearsed: bool) -> None:
        """After the forward pass.

        Args:
            output: what the model returned.
            batch: the micro-batch.
            rehearsed: whether the pass stands for those of a compiled model, which can be in another mode.
        """
        self.done, self._of_one = True, batch.rows == 1
        found = {table: table.outputs for table in self._tables if table.outputs}
        uses, consumers = uses_in_graph(output, {node for nodes in found.values() for node in nodes})
        for table in self._tables:
            table.outputs = None
        for table, nodes in found.items():
            if not rehearsed:  # no compiled graph expands them
                table.inspect([consumers[node] for node in nodes], batch.rows)
        keys = [[id(parameter) for parameter in layer.selected.module.parameters(False)] for layer in self._layers]
        calls = Counter[int]()
        for layer, own in zip(self._layers, keys, strict=True):
            calls.update(dict.fromkeys(own, batch.calls[layer.place]))
        for layer, own in zip(self._layers, keys, strict=True):
            # A layer that is compiled by itself has no counted calls.
            if any(uses[key] > max(calls[key], int(layer.selected.preconditioned)) for key in own):
                layer.shared.reasons.add(USED_ELSEWHERE)
        if self._weighs_behind:
            scales = self._scales()
            self._uncouple(output, keys, scales, rehearsed)
            self.hidden = [name for scale, name in scales.items() if scale not in uses]
            if self.hidden:
                logger.warning("%s", self.told())

    def told(self) -> str:
        """What the coverage report says of hidden BatchNorms; often empty."""
        if not self.hidden:
            return ""
        return (
            f"The graph of the first batch does not show the BatchNorms {listed(self.hidden)}: layers before them clip "
            "by themselves, which can cost accuracy (exclude_modules leaves layers plain)"
        )

    def _scales(self) -> dict[int, str]:
        """The ``id`` of the scale of each BatchNorm that trains, in training mode, and its name."""
        trained = {name: norm.weight for name, norm in self._norms.items() if norm.training}
        return {
            id(scale): name
            for name, scale in trained.items()
            if isinstance(scale, nn.Parameter) and scale.requires_grad and not is_sharded(scale)
        }

    def _uncouple(self, output: Any, keys: Sequence[Sequence[int]], scales: Mapping[int, str], rehearsed: bool) -> None:
        places, parameters = before_batch_norms(output, scales, rehearsed)
        before = [
            layer
            for layer, own in zip(self._layers, keys, strict=True)
            if layer.place in places or not parameters.isdisjoint(own)
        ]
        shared = [layer.shared for layer in before]
        able = [layer for layer in self._layers if layer.selected.preconditioned and layer.shared not in shared]
        fit = {layer.place for layer in able if not layer.reasons}
        clipped = before and (self._norms or not rehearsed)  # else nobody asked for it, or no compiled graph does it
        behind = behind_batch_norms(output, fit, scales, rehearsed) if clipped else ()
        for layer in self._layers:
            layer.clips_all = layer.place in behind
        for layer in before:
            layer.leave_out(CLIPPED_BEHIND if behind else COUPLED)
