"""FNGDPreconditioner: the engine alone. After backward, ``p.grad`` is the weighted gradient."""

import functools
import logging
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle

from hf_fngd.distributed.environment import refuse_environment
from hf_fngd.distributed.exchange import rank_and_world
from hf_fngd.distributed.join import Joins, JoinState
from hf_fngd.distributed.sharded import is_sharded
from hf_fngd.engine.attach import refuse_attached, unsupported
from hf_fngd.engine.coverage import Coverage, CoverageReport
from hf_fngd.engine.epochs import EpochEdge
from hf_fngd.engine.forward import Forwards
from hf_fngd.engine.gradients import Gradients
from hf_fngd.engine.layer import attached_layers
from hf_fngd.engine.positions import Positions
from hf_fngd.engine.state import check_state
from hf_fngd.engine.window import MicroBatch, Window, after_backward, in_backward
from hf_fngd.layers.modules import is_frozen, weight_of
from hf_fngd.layers.select import Selected, refuse_complex, refuse_unfit, select_layers
from hf_fngd.samples.ids import Ids
from hf_fngd.settings import READ_BY_POLICIES, Settings, with_settings
from hf_fngd.weights.algebra import accumulation_dtype
from hf_fngd.weights.base import SharingPolicy, State, policy_class

logger = logging.getLogger(__name__)


@with_settings(engine=True)
class FNGDPreconditioner(Joins):
    """Sample weights in a model's gradients, in front of any torch optimizer.

    Attach it, train with any optimizer, and call `step` once after every optimizer step, or let `follow` do so. Each
    backward pass leaves ``sum_n w_n h_n`` in the ``grad`` of the attached layers: with sharing "never" and "replay"
    that is ``lambda' (F + lambda I)^-1 g`` (Eq. 9 of arXiv 2403.03473). All other gradients are plain, but for those
    before a BatchNorm under "clipped": a layer behind it clips for them. The attribute ``epoch_ended`` says whether the
    last step was the last one of an epoch, as far as Accelerate's data loaders show.

    Args:
        model: the module that is called with the batch; ``batch_dim`` says where in it the samples are.
        **settings: see `Settings`.

    Raises:
        ValueError: an argument's value is wrong or has no effect, or nothing is left to precondition.
        TypeError: an argument's type is wrong, or ``model`` is no module.
        RuntimeError: the model is attached already.
    """

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"the first argument is the model, a torch.nn.Module, got {type(model).__name__}; with "
                "Trainer's optimizer_cls_and_kwargs use (FNGDFactory, {...}), which is handed the model"
            )
        model = getattr(model, "_orig_mod", model)  # which torch.compile wrapped, and runs
        own = self.settings = Settings.of("FNGDPreconditioner", settings, engine=True)
        refuse_environment(model)
        refuse_attached(model)
        self.policy = own.sharing if isinstance(own.sharing, SharingPolicy) else policy_class(own.sharing)()
        solves = self.policy.solves
        selection = select_layers(model, own.target_modules, own.exclude_modules, own.layer_types, solves=solves)
        refuse_complex(selection)
        if own.strict:
            refuse_unfit(selection)
        self.preconditioned, self.unweighed = selection.preconditioned, selection.unweighed
        self._first = self.layers[0].module
        self._attached = attached_layers(selection.attached, solves)
        self.policy.prepare(len(self._attached), **{name: own.effective(name) for name in READ_BY_POLICIES})
        self._model, self._edge = weakref.ref(model), EpochEdge()
        self.joining = JoinState()
        self._closing = -1  # the backward pass at whose end a step is closed
        self.window, self._gradients = Window(), Gradients()  # these as the last backward pass left them
        self.epoch_ended = self._told_of_loaders = False
        self._fsdp: bool | None = None  # not known before the first forward pass
        self._hooks: list[RemovableHandle] = []
        self._coverage = Coverage(selection, self._attached, own.strict, self.policy.compares)
        begin = weakref.WeakMethod(self._begin)
        self._forwards = Forwards(model, self._attached, self.window, begin, own.batch_dim, self.policy.weighs_behind)
        self._coverage.notes = (self._forwards.probing.told, self._forwards.inspection.told)
        self.positions = Positions(self._attached, len(self._forwards.live))
        # The model keeps none of this alive: without the optimizer it is plain again.
        weakref.finalize(self, self._forwards.drop).atexit = False

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "an FNGDPreconditioner cannot be copied or pickled, it belongs to one model: save its state_dict(), and "
            "build another one on the copy of the model"
        )

    @property
    def layers(self) -> list[Selected]:
        """The preconditioned layers that are trained now; ``preconditioned`` has those that are frozen as well."""
        return [layer for layer in self.preconditioned if not is_frozen(layer.module)]

    @property
    def model(self) -> nn.Module:
        """The model that this preconditioner is attached to; raises ReferenceError where it no longer exists."""
        model = self._model()
        if model is None:
            raise ReferenceError("the model of this FNGDPreconditioner no longer exists")
        return model

    @torch.no_grad()
    def step(self) -> None:
        """Close an optimizer step, after it was taken; without a backward pass since the last call, change nothing.

        With several processes all of them have to call it: in a coefficient step they exchange coefficients, and under
        ``sharing="clipped"`` norms in every step.
        """
        _, world = rank_and_world()
        begun, multiplications = self.window.begun, self.window.multiplications
        self.joining.announce(begun // world, True, self.device)
        batches = self.window.close()
        self._forwards.batch, self.epoch_ended = None, self._edge.passed()
        compared = self.policy.close(batches, begun, self._like()) if batches or world > 1 else 0
        self.positions.find(multiplications, self.device)
        self._coverage.tell(compared, begun, self._forwards.live)
        self._heed_epoch()

    def skip(self) -> None:
        """Close an optimizer step that is not taken: its micro-batches leave no trace."""
        self.joining.announce(self.window.begun // rank_and_world()[1], False, self.device)
        self.window.close()
        self._forwards.batch, self.epoch_ended = None, self._edge.passed()
        self._heed_epoch()

    def _heed_epoch(self) -> None:
        if not self.epoch_ended:
            return
        if self._edge.others and self.policy.awaits_epoch and not self._told_of_loaders:
            self._told_of_loaders = True
            logger.warning(
                "sharing=%r ends its first epoch with the first of several data loaders to end; the others are under "
                "way, or were left before their end. Where another one counts, call epochs_of(loader) with it, as "
                "accelerator.prepare returned it, before training",
                self.policy.name,
            )
        self.end_epoch()

    def end_epoch(self) -> None:
        """Say that an epoch ended: in a plain loop, after its last `step`. Idempotent."""
        if self.joining.active:  # where other processes are behind
            self.joining.epoch_ended = True
        else:
            self.policy.end_epoch()

    def epochs_of(self, loader: Any) -> None:
        """Say which of several data loaders ends an epoch; by default the first to end does.

        Raises TypeError for a loader that Accelerate did not prepare.
        """
        self._edge.follow(loader)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Call `step` after every step of an optimizer, or `skip` after one that a loss scaler skips, until `detach`.

        Where several optimizers share the model, follow all of them, or one that steps in every step. If they step
        inside backward, each from a hook on its parameter, `step` is called once, when the pass is over.

        Raises ValueError where the optimizer has none of the model's parameters.
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper
        parameters = list(self.model.parameters())
        own = {id(p) for p in parameters}
        # That of transformers' layer-wise optimizers has none itself, and its step comes after theirs.
        inside = (getattr(optimizer, "optimizer_dict", None) or {}).values()
        stepped = {id(p) for one in (optimizer, *inside) for group in one.param_groups for p in group["params"]}
        if own.isdisjoint(stepped) and not any(is_sharded(p) for p in parameters):  # whose optimizer swaps them later
            raise ValueError(
                f"this {type(optimizer).__name__} has no parameter of the preconditioner's model: it was built on "
                "another instance of it; build both on the model that is trained"
            )

        def close(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if in_backward():
                if self._closing != (now := torch._C._current_graph_task_id()):
                    after_backward(self.step)
                    self._closing = now
                return
            # torch's GradScaler calls a fused optimizer all the same, which then leaves the parameters as they are.
            if getattr(optimizer, "found_inf", None):
                self.skip()
            else:
                self.step()

        self._hooks.append(optimizer.register_step_post_hook(close))

    def follow_step(self, begun: int) -> None:
        """In a Join context a process without further batches calls this for each step of the others."""
        self.policy.close([], begun, self._like())
        self.positions.find(0, self.device)

    @property
    def device(self) -> torch.device:
        """The device of the sample weights."""
        return self._like().device

    _follower = property(lambda self: self)

    def detach(self) -> None:
        """Restore the model: afterwards it is the model that it was before attaching."""
        self._forwards.detach()
        self.window.close()
        while self._hooks:
            self._hooks.pop().remove()

    def _begin(self, size: int, ids: Ids | None) -> MicroBatch:
        """A training forward pass of ``size`` samples begins; ``ids`` say which rows are theirs."""
        if torch._C._get_tracing_state() is not None:
            raise unsupported("torch.jit.trace in training mode")
        if self._fsdp is None:
            refuse_environment(self.model)  # again, now that Accelerate has prepared it
            self._fsdp = any(isinstance(module, FSDPModule) for module in self.model.modules())
        self.joining.enter(self.policy.exchanges)
        if self._edge.missed():  # the last step of the epoch was skipped
            self.window.close()
            self.end_epoch()
        self.positions.trains(len(self._forwards.live))
        self.window.make_room(self._has_gradients)
        begin = functools.partial(self.policy.begin, size, self.window.next_offset)
        calls, asked = [0] * len(self._attached), 0 if self.positions.unknown else None
        again = weakref.WeakMethod(self._look_again)  # a model holds its last micro-batch
        batch = MicroBatch(size, begin, calls, again, ids, recomputed=in_backward(), multiplications=asked)
        self.window.add(batch, weight_of(self._first))
        return batch

    def _look_again(self, batch: MicroBatch) -> None:
        """A backward pass begins: gradients may have been cleared since its forward pass began."""
        if self.window.complete and not self._has_gradients() and self.window.forget_before(batch):
            batch.restart(functools.partial(self.policy.begin, batch.size, self.window.offset_of(batch)))
        Variable._execution_engine.queue_callback(lambda: self._gradients.note(self._forwards.live))

    def _has_gradients(self) -> bool:
        # FSDP2 puts an accumulated gradient on the parameter only when it is reduced.
        return self._fsdp or self._gradients.are_there(self._forwards.live)

    def _like(self) -> Tensor:
        """An empty tensor of the dtype and device of the sample weights."""
        weight = weight_of(self._first)
        assert weight is not None
        return torch.empty(0, dtype=accumulation_dtype(weight.dtype), device=weight.device)

    def coverage(self) -> CoverageReport:
        """What is preconditioned, what is not, and why; before the first step, what is expected to be."""
        return self._coverage.report()

    def stepped_by(self, *, unweighed: Iterable[str], fallback: Iterable[str]) -> None:
        """Tell the coverage report what the update rule steps unweighed, and what the fallback rule steps."""
        self._coverage.stepped, self._coverage.fallback = frozenset(unweighed), frozenset(fallback)

    def diagnostics(self) -> dict[str, float]:
        """Dimensionless numbers, for which the host waits for the device.

        ``weight_spread`` is the standard deviation of the sample weights over their mean, root mean square over the
        layers (not with sharing "uniform"). With "clipped" there is also ``largest_norm``: the largest norm of a
        sample, in units of the bound, median over the layers; 1 where no sample was clipped. With "never" and "replay"
        there is also ``rho``, the layers' gradient noise ratio (geometric mean), and with "replay" ``phase`` (0: the
        first epoch, 1: sharing).
        """
        return self.policy.diagnostics()

    def state_dict(self) -> State:
        """Counters and sample weights: tensors, numbers, strings, lists and dictionaries only."""
        return {
            "layers": {layer.selected.name: layer.state() for layer in self._attached},
            "sharing": self.policy.name,
            "policy": self.policy.state_dict(),
            "trained": self.positions.trained,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`. Raises ValueError, and loads nothing, where policy or layers are others."""
        names = [layer.selected.name for layer in self._attached]
        frozen = {layer.selected.name for layer in self._attached if is_frozen(layer.selected.module)}
        state = check_state(state_dict, self.policy.name, names, frozen)
        like = self._like()
        moved = {
            key: value.to(like if value.is_floating_point() else like.device)
            for key, value in state["policy"].items()
            if isinstance(value, Tensor)
        }
        self.policy.load_state_dict({**state["policy"], **moved})
        self.window.close()
        self._forwards.batch, self.positions.trained = None, state.get("trained", self.positions.trained)
        for layer in self._attached:
            layer.load_state(state["layers"][layer.selected.name])
