"""The forwards put on a model and its layers: the model's begins a micro-batch, a layer's belongs to it."""

import inspect
import logging
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm

from hf_fngd.distributed.environment import refuse_replica, refuse_split_weight, refuse_unfrozen
from hf_fngd.engine.attach import Attachment, unsupported
from hf_fngd.engine.backward import GraphHandle, LayerCall, begin, numbered
from hf_fngd.engine.inspection import Inspection
from hf_fngd.engine.layer import Layer
from hf_fngd.engine.probing import Probing, obstacle, shown
from hf_fngd.engine.reasons import NO_BATCH, ON_TOP_OF_ANOTHER, OTHER_INPUT, USED_ELSEWHERE
from hf_fngd.engine.recomputed import Regions
from hf_fngd.engine.rehearsal import Rehearsal, packed, rehearsing
from hf_fngd.engine.window import MicroBatch, Window, in_backward
from hf_fngd.layers.modules import is_frozen, plain_class, weight_of
from hf_fngd.samples.batch import find_sample, requires_grad
from hf_fngd.samples.ids import COLUMN, Ids, find_ids, is_one_row, of_tokens, read_ids
from hf_fngd.samples.inputs import copied
from hf_fngd.samples.rows import TOKENS, Rows, View
from hf_fngd.weights.base import StoredWeights

logger = logging.getLogger(__name__)


class Forwards:
    """Sends a model's training forward passes through the kernels of its layers. Other passes run as they are.

    ``opened`` refers to the function that begins a training forward pass of N samples. ``batch`` is the micro-batch of
    the last such pass; None where that had no samples, or its step is done. ``live`` lists the layers that are
    trained, or once were. With ``weighs_behind`` a layer behind the BatchNorms weighs samples for those before them.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[Layer],
        window: Window,
        opened: Callable[[], Callable[[int, Ids | None], MicroBatch] | None],
        batch_dim: int | None = None,
        weighs_behind: bool = False,
    ) -> None:
        self.batch: MicroBatch | None = None
        self._layers, self._window, self._opened = layers, window, opened
        self._handle = GraphHandle(layers, self._begin_in_graph)
        self._number: Tensor | None = None
        self._tokens = False  # whether a traced graph has the batch's tokens for rows
        self._whole = False  # whether it is that of the whole model, of which a batch is rehearsed
        own = model.__dict__.get("forward") or plain_class(model).forward
        self._own_ids = COLUMN in inspect.signature(own).parameters
        self._inside = self._rehearsing = False
        self._regions = Regions()
        self._leads_on = False  # whether an input of the model has a gradient in this pass
        modules = model.named_modules() if weighs_behind else ()
        norms = {name: module for name, module in modules if isinstance(module, _BatchNorm)}
        self._has_norms, self.inspection = bool(norms), Inspection(layers, weighs_behind, norms)
        self._model = weakref.ref(model)
        self.probing = Probing(layers, batch_dim)
        self._frozen = [layer for layer in layers if is_frozen(layer.selected.module)]  # from the beginning
        self.live = [layer for layer in layers if layer not in self._frozen]
        handlers = [(layer.selected.module, partial(self._layer_forward, layer)) for layer in layers]
        self._attachment = Attachment(model, self._model_forward, handlers)

    def detach(self) -> None:
        """Give the forwards back."""
        self.batch = None
        self._attachment.undo()

    def drop(self) -> None:
        """`detach`, as nobody holds the preconditioner any more."""
        if self._attachment.active and not self._window.stepped:
            logger.warning(
                "an FNGD or FNGDPreconditioner was dropped before its first step, and the model is plain again: keep "
                "it in a variable as long as it is to act; a preconditioner can also follow(optimizer)"
            )
        self.detach()

    def _begin(self, size: int, ids: Ids | None = None) -> MicroBatch:
        # A compiled graph calls this too: layers outside of the graph then find the micro-batch here.
        opened = self._opened()
        assert opened is not None  # or else the model would be plain again
        self.batch = opened(size, ids)
        return self.batch

    def _begin_in_graph(self, size: int, ids: Ids | None, rehearsal: Rehearsal) -> MicroBatch:
        self._look_for_unfrozen()
        dim = self.probing.dim
        if self.probing.left or not self.inspection.done:
            self._rehearse(rehearsal)
        self.probing.settle()
        if self.probing.dim != dim:  # this graph was made for another batch dimension: its step stays plain
            size, ids = 0, None
        batch = self._begin(size, ids)
        batch.sizes = self.probing.sizes(*(rehearsal.arguments or ((), {})), size)
        return batch

    def _rehearse(self, rehearsal: Rehearsal) -> None:
        """Run a compiled model's batch eagerly: first the probe's passes, then one whose autograd graph is read."""
        model, inspected = self._model(), self.inspection.done
        self.inspection.done = True
        if model is None or in_backward():
            return
        reason = obstacle(model)
        if reason is None and rehearsal.arguments is None:
            reason = "the compiled model has inputs that are no tensors, integers or containers of these"
        if reason is None and rehearsal.arguments is not None:
            args, kwargs = copied(rehearsal.arguments)  # a model may change its inputs in place
            self._rehearsing, self.inspection.done = True, inspected
            try:
                with rehearsing(model, rehearsal):
                    model.forward(*args, **kwargs)
            except Exception as error:  # whatever a model does where it is not compiled
                reason = f"an eager forward pass failed ({shown(error)})"
            finally:
                self._rehearsing, self.inspection.done, self.batch, self._number = False, True, None, None
        if reason is not None:
            self.probing.left = 0
            self.probing.fail(reason)

    def _begin_rehearsed(self, size: int, ids: Ids | None) -> MicroBatch:
        """The micro-batch of a rehearsal: it has no backward pass and belongs to no step."""
        return MicroBatch(size, partial(StoredWeights, size), [0] * len(self._layers), lambda: None, ids)

    def _look_for_unfrozen(self) -> None:
        """Take in layers that were frozen and now train: the next forward passes probe and inspect them as well."""
        still = [layer for layer in self._frozen if is_frozen(layer.selected.module)]
        if len(still) == len(self._frozen):
            return
        refuse_unfrozen()
        for layer in self._frozen:
            if layer not in still:
                self._attachment.refuse_left(layer.selected.module)
        self._frozen, self.live = still, [layer for layer in self._layers if layer not in still]
        self.inspection.done, self.probing.left = False, self.probing.PROBES

    def _model_forward(self, module: nn.Module, own: Callable[..., Any], *args: Any, **given: Any) -> Any:
        kwargs = given if self._own_ids else {key: value for key, value in given.items() if key != COLUMN}
        if not ((module.training or self._rehearsing) and torch.is_grad_enabled()):
            return self._of_no_batch(own, *args, **kwargs)
        if self._inside:  # somebody (Accelerate, say) wrapped the model's forward, and the wrapper calls it here
            return own(*args, **kwargs)
        refuse_replica(module)
        sample = find_sample(args, kwargs)
        self._leads_on = requires_grad((args, kwargs))
        self._whole = compiling = torch.compiler.is_compiling()
        if not compiling and self._frozen:
            self._look_for_unfrozen()
        if not compiling and self.probing.left and sample is not None and not is_one_row(given, sample):
            self.probing.probe(module, own, args, kwargs, sample)
        dim = self.probing.dim
        if sample is not None and dim < sample.dim():
            sample = sample.movedim(dim, 0)
        told = None if sample is None else find_ids(given, sample, dim)
        self._tokens = sample is not None and told is not None and of_tokens(*told, sample)
        if compiling:
            self._number = None if sample is None else self._begin_traced(sample, told, args, given)
            return self._of_batch(own, args, kwargs)
        batch = self.batch = None
        if sample is not None:
            ids = None if told is None else read_ids(*told, sample)
            size = len(sample) if ids is None else ids.samples
            batch = self.batch = (self._begin_rehearsed if self._rehearsing else self._begin)(size, ids)
            batch.tokens, batch.sizes = self._tokens, self.probing.sizes(args, kwargs, len(sample))
            batch.leads_on = self._leads_on
        # Layers that are compiled one by one find the micro-batch by its number.
        self._number = None if batch is None else numbered(batch)
        inspects = self.inspection.begin(batch)
        output = self._of_batch(own, args, kwargs)
        if batch is not None:
            self._window.passed()
            if inspects:
                self.inspection.read(output, batch, rehearsed=self._rehearsing)
        return output

    def _begin_traced(
        self, sample: Tensor, told: tuple[str, list[Tensor]] | None, args: Any, given: dict[str, Any]
    ) -> Tensor:
        """In a traced graph: the operator that begins a micro-batch whenever the graph runs."""
        cast = torch.is_autocast_enabled(sample.device.type)
        autocast = torch.get_autocast_dtype(sample.device.type) if cast else None
        number: Tensor = begin(sample, self._handle.number, *(told or ("", [])), *packed(args, given), autocast)
        return number

    def _of_batch(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a training forward pass: its layers belong to the micro-batch that has begun."""
        self._inside = True
        try:
            return own(*args, **kwargs)
        finally:
            self._inside = False

    def _of_no_batch(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a forward pass that is no training pass: its layers must not take the last micro-batch for theirs."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return own(*args, **kwargs)
        kept, self.batch = self.batch, None
        try:
            return own(*args, **kwargs)
        finally:
            self.batch = kept

    def _layer_forward(
        self, layer: Layer, module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if self.probing.seen is not None:
            self.probing.see(layer, (*args, *kwargs.values()))
            return own(*args, **kwargs)
        weight, x = weight_of(module), (*args, *kwargs.values())
        compiling = torch.compiler.is_compiling()
        recomputes = not compiling and in_backward()
        # A layer in evaluation mode, as of a body without dropout, belongs to the model's training pass all the same.
        training = module.training or self._inside or recomputes
        trains = training and torch.is_grad_enabled() and weight is not None and weight.requires_grad
        call = partial(own, *args, **kwargs)
        if not trains or not x or not layer.kernel.takes(*x):
            return _followed(layer, call(), OTHER_INPUT if self._inside and not layer.kernel.fault else None)
        if compiling:
            return call() if self._number is None else self._traced_call(layer, module, call, x[0], self._number)
        assert weight is not None
        return self._eager_call(layer, module, call, x[0], weight, recomputes)

    def _traced_call(self, layer: Layer, module: nn.Module, own: partial[Any], x: Tensor, number: Tensor) -> Any:
        """A call in a traced graph: the engine decides at run time, by the number of the micro-batch."""
        # What a later probe finds is left to `sample_weights`: here it would cause a recompilation.
        rows: Rows | None = View(layer.dim, "last") if layer.kernel.by_rows and layer.dim else None
        tokens = self._tokens and x.dim() + layer.kernel.of_ids > 2
        if layer.kernel.by_rows and tokens and layer.kernel.folds(1):
            rows = TOKENS
        call = LayerCall(
            layer.kernel,
            layer.place,
            number,
            self._handle.number,
            rows,
            self._whole,
            may_pass_on=self._has_norms and not self._leads_on,
        )
        return layer.kernel.run(module, own, x, call)

    def _eager_call(
        self, layer: Layer, module: nn.Module, own: partial[Any], x: Tensor, weight: Tensor, recomputes: bool
    ) -> Any:
        """A call in eager mode; ``recomputes``: activation checkpointing makes it, in a backward pass."""
        batch = self._batch_of_call(recomputes)
        if not (layer.selected.preconditioned or self._inside or recomputes):
            layer.shared.reasons.add(USED_ELSEWHERE)  # nothing tells which batch the call belongs to
        if batch is None:
            # A call that is not weighed reports whether a gradient came through it.
            return _followed(layer, own(), NO_BATCH if self._inside else None)
        # A matrix keeps its kernel although its samples are not weighed: checkpointing expects the call that it saved.
        if not layer.selected.preconditioned and USED_ELSEWHERE in layer.shared.reasons:
            return own()
        rows, unfit = layer.locate(x, batch)
        if unfit is not None:
            batch.calls[layer.place] += self._inside or not recomputes
            layer.shared.reasons.add(unfit)
            return own()
        refuse_split_weight(weight)
        if torch._C._are_functorch_transforms_active():
            raise unsupported("A transform of torch.func")
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
            raise unsupported("A forward-mode derivative")
        if recomputes and not batch.recomputed and self._window.mixed_up(layer.place):
            layer.shared.reasons.add(ON_TOP_OF_ANOTHER)
            return own()
        # A recomputed call is not a second call, unless checkpointing recomputes the whole model's forward pass.
        batch.calls[layer.place] += self._inside or not recomputes
        return layer.kernel.run(module, own, x, LayerCall(layer, layer.place, batch, self._handle.number, rows))

    def _batch_of_call(self, recomputes: bool) -> MicroBatch | None:
        """The micro-batch that a layer's call belongs to; None for a call that is in no forward pass of the model."""
        batch = self.batch if self._inside or recomputes else None
        if recomputes and not self._inside:
            batch = self._regions.find(batch)
        self._regions.note(batch)
        return batch


def _followed(layer: Layer, y: Any, reason: str | None) -> Any:
    """`Layer.follow`, where the output of a call can have a hook."""
    transformed = torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None
    hooked = torch.is_grad_enabled() and not torch.compiler.is_compiling() and not transformed
    return layer.follow(y, reason) if hooked else y
