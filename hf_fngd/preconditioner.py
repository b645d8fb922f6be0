"""FNGDPreconditioner: the engine alone. After backward, ``p.grad`` is the preconditioned gradient."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle

from hf_fngd.arguments import validate
from hf_fngd.attach import refuse_attached
from hf_fngd.backward import LayerSlot, MicroBatch, in_backward
from hf_fngd.coverage import Coverage, CoverageReport
from hf_fngd.environment import rank_and_world, refuse_environment
from hf_fngd.exchange import Exchange, Measurement, sum_over_processes
from hf_fngd.forwards import Forwards
from hf_fngd.inputs import check_index
from hf_fngd.persample import accumulation_dtype
from hf_fngd.phase import EpochEdge, Phase, schedule
from hf_fngd.ratios import Ratios
from hf_fngd.rest import rest_slots
from hf_fngd.selection import Modules, Selected, select_layers
from hf_fngd.sharded import is_sharded
from hf_fngd.sharing import BatchInfo, IndexSharing, SharingPolicy, Suspects, make_policy, policy_names
from hf_fngd.sharing.base import State
from hf_fngd.state import check_state
from hf_fngd.window import Window


class FNGDPreconditioner:
    """Weights for the samples in a model's gradients, computed in some steps and shared in the others.

    Attach it, train with any optimizer, and call `step` once after every optimizer step (or let `follow` do
    so). Each backward then leaves ``sum_n w_n h_n`` in the ``grad`` of the preconditioned layers, which is
    ``lambda' (F + lambda I)^-1 g`` (Eq. 9) where the sharing policy solves for w, in embeddings and tied heads a sum
    with the mean of these weights, and the plain gradient everywhere else.

    Args:
        model: the module that is called with the batch; its first dimension is the sample.
        damping: alpha of Eq. 14: lambda is alpha times the Frobenius norm of the layer's Gram matrix. Of no effect on
            the weights of "clipped" and "uniform".
        sharing: a policy's name (`hf_fngd.sharing.policy_names`) or a policy object.
        refresh: optimizer steps between coefficient steps after the first phase, 0 for none; None: 50, and 0 where the
            policy solves for nothing ("clipped", "uniform").
        coefficient_steps: cap of the first phase, which ends with the first epoch at the latest and of which every step
            is a coefficient step, in optimizer steps; None: 100, and no first phase where refresh would be 0.
        memory_budget: bound in bytes of the store, and of the temporary memory of a coefficient step beyond float32
            copies of one layer's input and output gradient.
        target_modules: ``"all-linear"``, a regular expression, or a list of names or dotted suffixes (PEFT's).
        exclude_modules: a regular expression or a list, or None.
        weigh_rest: weigh the samples in embeddings, tied heads and convolutions of raw input too, by the mean over the
            layers of the weights that the policy keeps ("never" and "sketched" keep none; "last" and "replay" have none
            for a coefficient step; "clipped" goes by the norms of the module's own gradients). Not those of
            ``exclude_modules``.
        strict: raise, instead of warning, where a selected layer cannot be preconditioned.

    Raises:
        ValueError: an argument's value is wrong, or nothing is left to precondition.
        TypeError: an argument's type is wrong, or ``model`` is no module.
        RuntimeError: the model is attached already.
    """

    def __init__(
        self,
        model: nn.Module,
        damping: float = 0.1,
        *,
        sharing: str | SharingPolicy = "clipped",
        refresh: int | None = None,
        coefficient_steps: int | None = None,
        memory_budget: int = 2**28,
        target_modules: Modules = "all-linear",
        exclude_modules: Modules = None,
        weigh_rest: bool = True,
        strict: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"the first argument is the model, a torch.nn.Module, got {type(model).__name__}; with "
                "Trainer's optimizer_cls_and_kwargs use (FNGDFactory, {...}), which is handed the model"
            )
        values: dict[str, object] = {
            "damping": damping,
            "refresh": refresh,
            "coefficient_steps": coefficient_steps,
            "memory_budget": memory_budget,
            "target_modules": target_modules,
            "exclude_modules": exclude_modules,
            "weigh_rest": weigh_rest,
            "strict": strict,
        }
        if not isinstance(sharing, SharingPolicy):
            values["sharing"] = sharing
        validate(values, choices={"sharing": policy_names()})
        refuse_environment(model)
        refuse_attached(model)
        self.damping = damping
        self.policy = make_policy(sharing)
        coefficient_steps, refresh = schedule(coefficient_steps, refresh, self.policy.natural)
        self.phase = Phase(coefficient_steps, refresh, always=self.policy.always)
        selection = select_layers(model, target_modules, exclude_modules)
        self.layers: list[Selected] = selection.layers
        self._model = weakref.ref(model)
        self._edge = EpochEdge()
        self._exchange = Exchange()
        self._window = Window()
        self._ratios = Ratios(len(self.layers))
        self.epoch_ended = False
        self._checked = False
        self._fsdp = False
        self._hooks: list[RemovableHandle] = []
        self.slots = [
            LayerSlot(place, layer.name, layer.kernel, self.policy, damping, memory_budget)
            for place, layer in enumerate(self.layers)
        ]
        weigh_rest = weigh_rest and not self.policy.always
        self.rest = rest_slots(selection.rest if weigh_rest else [], len(self.layers), self.policy)
        self.policy.prepare(len(self.layers), coefficient_steps, memory_budget, len(self.rest))
        self._coverage = Coverage(selection, self.slots, self.rest, strict)
        self._forwards = Forwards(model, self.layers, self.slots, self.rest, self._window, self._begin)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "an FNGDPreconditioner cannot be copied or pickled, it belongs to one model: save its state_dict(), and "
            "build another one on the copy of the model"
        )

    @property
    def model(self) -> nn.Module:
        """The model that this preconditioner is attached to.

        Raises:
            ReferenceError: the model no longer exists.
        """
        model = self._model()
        if model is None:
            raise ReferenceError("the model of this FNGDPreconditioner no longer exists")
        return model

    @property
    def rho(self) -> Tensor:
        """Noise ratios of the layers in the last step ``[L]``; NaN where none was ever measured."""
        return self._ratios.rho

    @property
    def spread(self) -> Tensor:
        """``mean(w^2)`` of the layers in the last step ``[L]``."""
        return self._ratios.spread

    @torch.no_grad()
    def step(self) -> None:
        """Close an optimizer step: store its coefficients, update rho, advance the phase.

        Sets `epoch_ended` to whether Accelerate's data loaders say that it was the last of an epoch. A call without a
        backward pass since the last one changes no coefficients. With several processes all of them have to call it:
        in a coefficient step they exchange their coefficients, and under ``sharing="clipped"`` norms in every step.
        """
        computes, sharing = self.phase.computes, self.phase.sharing
        _, world = rank_and_world()
        begun = self._window.begun
        batches = self._window.close()
        self._forwards.batch, self.epoch_ended = None, self._edge.passed()
        compared = self._remember(batches)
        # The backward pass of one process may have reached no layer; all have to go on alike.
        if batches or (begun and world > 1):
            self._ratios.update(self._commit(batches, computes))
            layers = {layer for batch in batches for layer in batch.weighed}
            self._ratios.weights = tuple(
                torch.cat([batch.weighed[layer] for batch in batches if layer in batch.weighed]) for layer in layers
            )
            self.phase.advance()
            if self.phase.sharing and not sharing:
                self._window.place = 0
            self._coverage.tell(compared)
        else:
            self._coverage.tell_of_none()
        if self.epoch_ended:
            self.end_epoch()

    def skip(self) -> None:
        """Close an optimizer step that is not taken: its micro-batches leave no trace, and no phase advances."""
        self._window.abandon()
        self._forwards.batch, self.epoch_ended = None, self._edge.passed()
        if self.epoch_ended:
            self.end_epoch()

    def _commit(self, batches: Sequence[MicroBatch], computes: bool) -> list[Measurement]:
        """Store a step's coefficients, those of all processes, and return them."""
        own = [
            Measurement(batch.info, batch.fresh, batch.rho)
            for batch in batches
            if batch.fresh is not None and batch.rho is not None
        ]
        several = computes and rank_and_world()[1] > 1
        measurements = self._exchange.gather(own, self._like()) if several else own
        for m in measurements:
            self.policy.commit(m.w, m.valid, m.info)
        return measurements

    def _remember(self, batches: Sequence[MicroBatch]) -> int:
        """Tell the policy a step's norms, where it wants them, and return how many samples its weights compare."""
        samples = max((batch.info.size for batch in batches), default=0)
        if not self.policy.wants_norms(len(batches)):
            return samples
        like = self._like().new_empty(len(self.layers) + len(self.rest))
        rows = like.new_zeros(len(batches), 2 * len(like) + 1, dtype=torch.float64)
        for row, batch in zip(rows, batches, strict=True):
            norms = batch.norms_of_samples(like)
            row.copy_(torch.cat([norms.sum(dim=1), norms.count_nonzero(dim=1), norms.new_ones(1)]))
        total = sum_over_processes(rows.sum(dim=0))
        sums, counts = total[:-1].view(2, -1).to(like)
        micro_batches = int(total[-1])  # waits for the device
        self.policy.remember(sums, counts, micro_batches)
        return samples * micro_batches

    def _like(self) -> Tensor:
        """A ``[L]`` tensor of the dtype and device of the coefficients."""
        weight = self.layers[0].module.weight
        assert isinstance(weight, Tensor)
        return torch.empty(len(self.layers), dtype=accumulation_dtype(weight.dtype), device=weight.device)

    def end_epoch(self) -> None:
        """Say that an epoch ended: in a plain loop, after its last `step`. Idempotent."""
        self.phase.end_epoch()
        self._window.place = 0

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Call `step` after every step of an optimizer, until `detach`.

        A fused optimizer is also called by a loss scaler that has found an overflow, and then leaves the parameters as
        they are: that is a `skip`.

        Raises:
            ValueError: the optimizer has none of the model's parameters.
        """
        parameters = list(self.model.parameters())
        own = {id(p) for p in parameters}
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if own.isdisjoint(stepped) and not any(is_sharded(p) for p in parameters):  # whose optimizer swaps them later
            raise ValueError(
                f"this {type(optimizer).__name__} has no parameter of the preconditioner's model: it was built on "
                "another instance of it; build both on the model that is trained"
            )

        def close(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            overflowed = getattr(optimizer, "found_inf", None)  # torch's GradScaler sets it for the step
            if overflowed is not None and bool(overflowed):
                self.skip()
            else:
                self.step()

        self._hooks.append(optimizer.register_step_post_hook(close))

    def detach(self) -> None:
        """Restore the model: afterwards it is the model that it was before attaching."""
        self._forwards.detach()
        self._window.abandon()
        while self._hooks:
            self._hooks.pop().remove()

    # A training forward pass ---------------------------------------------------------------------------

    def _begin(self, size: int, index: Tensor | None) -> MicroBatch:
        """A training forward pass of the model begins: a new micro-batch with its weights.

        Args:
            size: number of samples N.
            index: dataset indices of the samples, where the batch carries them.

        Raises:
            ValueError: the index column is missing or is not one integer a sample.
            RuntimeError: the model was prepared for a mode that FNGD refuses, or steps are never closed.
        """
        if not self._checked:  # again, now that Accelerate has prepared it
            refuse_environment(self.model)
            self._fsdp = any(isinstance(module, FSDPModule) for module in self.model.modules())
            self._checked = True
        check_index(index, size, self.policy)
        if self._edge.missed():  # the last step of the epoch was skipped
            self._window.abandon()
            self.end_epoch()
        self._window.make_room(self._has_gradients())
        info = BatchInfo(size, self._window.next_place, None if index is None else index.detach().flatten())
        computes = self.phase.computes
        kept = self.policy.lookup(info) if not computes or (self.rest and self.policy.follows) else None
        layers = len(self.layers)
        batch = MicroBatch(
            info,
            computes,
            None if computes else kept,
            [0] * (layers + len(self.rest)),
            layers,
            None if kept is None or not self.rest else self._ratios.mean_of_measured(kept),
            recomputed=in_backward(),
        )
        self._window.add(batch)
        return batch

    def _has_gradients(self) -> bool:
        weights = [layer.module.weight for layer in self.layers]
        # Under FSDP2 an accumulated gradient is not on the parameter until it is reduced; a weight that is computed
        # from other parameters (pruned meanwhile) has none.
        return self._fsdp or any(
            isinstance(w, Tensor) and (is_sharded(w) or not w.is_leaf or w.grad is not None) for w in weights
        )

    # Reports ---------------------------------------------------------------------------------------------

    def coverage(self) -> CoverageReport:
        """What is preconditioned, what is not, and why; before the first step, what is going to be."""
        return self._coverage.report()

    def diagnostics(self) -> dict[str, float]:
        """What a user wants to see, as plain numbers (waits for the device).

        Returns:
            ``phase`` (0: the first, 1: sharing), ``rho`` (geometric mean over the layers; not there before a
            coefficient step) and ``weight_spread`` (standard deviation of w over its mean, root mean square over the
            layers; where the norms of every batch tell the weights, those of this process's samples in the last step).
        """
        return {"phase": float(self.phase.sharing), **self._ratios.summary()}

    def suspects(self) -> Suspects:
        """The samples of the dataset and their mean weights, the lowest first; those seen in coefficient steps so far.

        Alike on all processes. In the first epoch every step is a coefficient step (up to ``coefficient_steps``), later
        on one in ``refresh``.

        Raises:
            ValueError: the sharing policy does not follow samples.
        """
        if not isinstance(self.policy, IndexSharing):
            raise ValueError(
                f"suspects() needs weights that follow samples, this optimizer has sharing={self.policy.name!r}: use "
                'sharing="index", and train on hf_fngd.add_index(dataset)'
            )
        return self.policy.suspects()

    # State -----------------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """Phase, counters, coefficients and rho: tensors, numbers, strings, lists and dictionaries only."""
        return {
            "phase": self.phase.state_dict(),
            "place": self._window.place,
            "averages": self._ratios.averages,
            "layers": {slot.name: [slot.batch_first, slot.repeated] for slot in self.slots},
            "rest": {slot.name: slot.state() for slot in self.rest},
            "sharing": self.policy.name,
            "policy": self.policy.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`.

        Raises:
            ValueError: the state belongs to another policy or to other layers; nothing of it was loaded.
        """
        rest = check_state(
            state_dict, self.policy.name, [slot.name for slot in self.slots], [slot.name for slot in self.rest]
        )
        like = self._like()
        policy = {
            key: value.to(like if value.is_floating_point() else like.device) if isinstance(value, Tensor) else value
            for key, value in state_dict["policy"].items()
        }
        self.policy.load_state_dict(policy)
        self.phase.load_state_dict(state_dict["phase"])
        self._window.abandon()
        self._window.place, self._forwards.batch = state_dict["place"], None
        averages = state_dict["averages"]
        self._ratios.load(None if averages is None else averages.to(like, copy=True))
        for slot in self.slots:
            slot.batch_first, slot.repeated = state_dict["layers"][slot.name]
        for one in self.rest:
            one.load_state(rest[one.name])
