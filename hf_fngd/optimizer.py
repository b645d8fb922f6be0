"""FNGD: the preconditioner and an update rule, as one torch optimizer."""

import dataclasses
import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from hf_fngd.checks import Misplaced
from hf_fngd.config import TRAINING_ARGS, FNGDConfig, set_in, tell_of_rate
from hf_fngd.distributed.join import Joins
from hf_fngd.distributed.sharded import local
from hf_fngd.engine.coverage import CoverageReport
from hf_fngd.engine.state import GONE, check_keys, gone
from hf_fngd.preconditioner import FNGDPreconditioner
from hf_fngd.settings import Settings, with_settings
from hf_fngd.updates import FALLBACK_RULES, RULES, Update
from hf_fngd.updates.block_muon import describe_blocks, keep_positions, known_positions
from hf_fngd.updates.chosen import by_name
from hf_fngd.updates.gradients import of_layers, real, squared_norms
from hf_fngd.updates.groups import check_parameters, in_force, parameter_groups, resized, trainable, with_rate
from hf_fngd.updates.loaded import check_groups, with_frozen
from hf_fngd.updates.momentum import natural_scales, scaled_gradients
from hf_fngd.weights.solve import damping_from_gradient
from hf_fngd.weights.solved import SolvedPolicy

logger = logging.getLogger(__name__)

_STATE_KEY = "fngd"


@with_settings(engine=False)
class FNGD(torch.optim.Optimizer, Joins):
    """Inverse-free fast natural gradient descent (arXiv 2403.03473), and sample clipping, its default.

    The backward pass leaves weighted sums of the samples' gradients. `step` applies the update rule to Linear, Conv1D
    and convolution layers, and the fallback rule to everything else (embeddings, tied heads, norms). Muon also steps
    experts and the projections of torch's attention, whose samples are not weighed, and leaves output heads and some
    convolutions to the fallback rule. Construct it on the model that is trained, before or without wrapping it for
    distributed training.

    A step in which a gradient is NaN, infinite or too large to be squared in float32 is skipped whole: parameters,
    moments and sample weights stay as they were, and the attribute ``skipped`` counts it (with FNGDCallback, also the
    steps that a loss scaler skips).

    Args:
        model: the module that is called with the batch; ``batch_dim`` says where in it the samples are.
        **settings: see `Settings`.

    Raises:
        ValueError, TypeError, RuntimeError: as `FNGDPreconditioner`, which is the attribute ``preconditioner``.
    """

    def __init__(self, model: nn.Module, lr: float | None = None, **settings: Any) -> None:
        self.settings = Settings.of("FNGD", {"lr": lr, **settings})
        self.preconditioner = FNGDPreconditioner(model, **self.settings.values(engine=True))
        self.skipped = 0
        self.built_from_args = False
        self._checked: list[int] = []  # the trainable parameters in the last step
        inner = self.preconditioner.model
        self.settings = with_rate(self.settings, inner)
        layers, unweighed = self.preconditioner.preconditioned, self.preconditioner.unweighed
        try:
            groups = parameter_groups(inner, layers, unweighed, self.settings, FALLBACK_RULES[self.settings.fallback])
        except Exception:
            self.preconditioner.detach()  # the model is plain again, which the error says enough about
            raise
        grouped = [(name, group) for group in groups for name, _ in group["params"]]
        self.preconditioner.stepped_by(
            unweighed=(name for name, group in grouped if "matrices" in group and not group["layers"]),
            fallback=(name for name, group in grouped if not ("matrices" in group or group["layers"])),
        )
        if self.settings.param_groups:
            named = by_name(inner, self.settings.param_groups)
            self.settings = dataclasses.replace(self.settings, param_groups=named)
        self.preconditioner.positions.count = known_positions(groups)
        defaults = {name: self.settings.effective(name) for name in ("lr", "momentum", "beta2", "eps")}
        super().__init__(groups, defaults)

    @classmethod
    def from_config(cls, model: nn.Module, config: FNGDConfig | str | os.PathLike[str], **overrides: Any) -> Self:
        """Build the optimizer from an `FNGDConfig`, or from a name that `FNGDConfig.load` accepts.

        ``overrides`` are arguments of `FNGD`.
        """
        config = config if isinstance(config, FNGDConfig) else FNGDConfig.load(config)
        return cls(model, **(config.optimizer_arguments() | overrides))

    @classmethod
    def from_training_args(
        cls, model: nn.Module, args: Any, config: FNGDConfig | str | os.PathLike[str] | None = None, **overrides: Any
    ) -> Self:
        """Build from `TrainingArguments` and a config or its name; ``overrides``, arguments of `FNGD`, win over both.

        ``learning_rate``, ``weight_decay``, ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` count if they are not
        at their defaults; otherwise the config's values do. Raises ValueError where both are set and differ. Warns
        where ``update="momentum"`` meets gradient clipping.
        """
        if config is not None and not isinstance(config, FNGDConfig):
            config = FNGDConfig.load(config)
        config = FNGDConfig() if config is None else config
        chosen = set_in(args, config, overrides)
        try:
            optimizer = cls.from_config(model, config, **(chosen | overrides))
        except ValueError as error:
            for name in chosen:
                if str(error).startswith(f"{name}="):
                    error.add_note(f"It comes from {TRAINING_ARGS[name]} of TrainingArguments.")
            raise
        optimizer.built_from_args = True
        if "lr" not in chosen | overrides:
            tell_of_rate(args, config, optimizer.settings)
        if "momentum" in optimizer.settings.updates and (args.max_grad_norm or 0) > 0:
            warnings.warn(
                "update='momentum' takes its step from the size of the gradient, which "
                f"max_grad_norm={args.max_grad_norm} changes: set max_grad_norm=0 in TrainingArguments (the step has a "
                "trust region of its own)",
                stacklevel=2,
            )
        return optimizer

    @property
    def config(self) -> FNGDConfig:
        """The arguments, to be saved and shared. Raises TypeError where ``sharing`` is an object."""
        return FNGDConfig(**self.settings.values())

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "FNGD cannot be copied or pickled, it belongs to one model: save its state_dict(), and build another one "
            "on the copy of the model"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group that FNGD has made of the model; raises ValueError for any other."""
        if "rule" not in param_group:
            raise ValueError(
                "FNGD makes its parameter groups from the model: add the parameters to the model, then build FNGD anew "
                "(with param_groups=[...] where they have settings of their own)"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters from their ``grad``; ``closure`` as in `torch.optim.Optimizer.step`.

        Raises:
            RuntimeError: the optimizer lacks a trainable parameter of the model (a layer was replaced, say); a gradient
                is sparse; or in the first step no parameter has a gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._checked != (now := trainable(self.preconditioner.model)):
            check_parameters(self.preconditioner.model, self.param_groups, self.preconditioner.window.complete)
            self._checked = now
        natural = "momentum" in self.settings.updates
        squared = squared_norms(self.param_groups, exact=natural)
        # Are all gradients finite, and their squares in float32? Here the host waits for the device.
        if squared is not None and not squared.sum() <= torch.finfo(torch.float32).max:
            self.preconditioner.skip()
            self.skipped += 1
            if self.skipped.bit_count() == 1:  # at powers of two, so as not to fill the log
                logger.warning(
                    "FNGD skipped a step, %d so far: a gradient was NaN, infinite or too large to be squared; look for "
                    "bad samples or a learning rate that is too high",
                    self.skipped,
                )
            return loss
        replicas = self.preconditioner.window.replicas
        self.preconditioner.step()
        keep_positions(self.param_groups, self.preconditioner.positions.count)
        scales = None
        if squared is not None and natural:
            policy = self.preconditioner.policy
            assert isinstance(policy, SolvedPolicy)
            norms, sizes = of_layers(squared, self.param_groups, len(self.preconditioner.preconditioned))
            scales = natural_scales(norms, sizes, policy.rho, policy.spread, policy.damping)
        for group in self.param_groups:
            self._update_group(group, scales, replicas)
        return loss

    def _update_group(
        self, group: dict[str, Any], scales: Tensor | None, replicas: torch.distributed.ProcessGroup | None
    ) -> None:
        rule = RULES[group["rule"]]
        live = [place for place, p in enumerate(group["params"]) if p.grad is not None]
        if not live:
            return
        params: list[Tensor] = [group["params"][place] for place in live]
        grads: list[Tensor] = [real(local(p.grad)) for p in params if p.grad is not None]
        if scales is not None and group["layers"] and group["rule"] == "momentum":
            grads = scaled_gradients(grads, [group["layers"][place] for place in live], scales)
        states = [self.state[p] for p in params]
        for place, state, p in zip(live, states, params, strict=True):
            if not state:
                state["step"] = 0
                state.update({name: torch.zeros_like(p) for name in rule.state})
            elif any(state[name].shape != p.shape for name in rule.state):
                state.update(resized({name: state[name] for name in rule.state}, p, group["param_names"][place]))
            elif any(state[name].dtype != p.dtype or state[name].device != p.device for name in rule.state):
                state.update({name: state[name].to(p) for name in rule.state})  # as the model was moved meanwhile
            state["step"] += 1
        tensors = [[real(local(state[name])) for state in states] for name in rule.state]
        own = [real(local(p)) for p in params]
        matrices = [tuple(group["matrices"][place]) for place in live] if rule.matrices else []
        steps = [s["step"] for s in states]
        rule.update(Update(own, grads, tensors, steps, params, matrices, group, replicas))

    def end_epoch(self) -> None:
        """See `FNGDPreconditioner.end_epoch`. Trainer needs no such call."""
        self.preconditioner.end_epoch()

    def epochs_of(self, loader: Any) -> None:
        """See `FNGDPreconditioner.epochs_of`."""
        self.preconditioner.epochs_of(loader)

    @property
    def _follower(self) -> FNGDPreconditioner:
        return self.preconditioner

    def detach(self) -> None:
        """See `FNGDPreconditioner.detach`."""
        self.preconditioner.detach()

    def coverage(self) -> CoverageReport:
        """`FNGDPreconditioner.coverage`; after the first step its note says how many matrices are in blocks."""
        report = self.preconditioner.coverage()
        notes = (report.note, describe_blocks(self.param_groups))
        return dataclasses.replace(report, note="\n  ".join(filter(None, notes)))

    @torch.no_grad()
    def diagnostics(self) -> dict[str, float]:
        """`FNGDPreconditioner.diagnostics` and ``skipped``; with sharing "never" and "replay" also ``lambda``.

        lambda is the geometric mean over the layers, measured on ``p.grad``: call it between `step` and ``zero_grad``.
        Clipping makes it smaller, by the square of the factor; so does averaging over accumulated micro-batches, since
        rho is that of one. Under FSDP2 all processes have to call it.
        """
        values = self.preconditioner.diagnostics() | {"skipped": float(self.skipped)}
        policy = self.preconditioner.policy
        if isinstance(policy, SolvedPolicy):
            values["lambda"] = math.nan
            norms = squared_norms(self.param_groups)
            if norms is not None:
                squared, _ = of_layers(norms, self.param_groups, len(self.preconditioner.preconditioned))
                damping = damping_from_gradient(policy.rho.to(squared), squared, policy.damping)
                values["lambda"] = float(damping[damping > 0].log().mean().exp())  # NaN where there is none
        return values

    def state_dict(self) -> dict[str, Any]:
        """Torch's, with FNGD's own state in the first parameter group; it loads with ``weights_only=True``."""
        # There, unlike in the per-parameter state, nothing is cast to the parameters' dtype on loading, and nothing is
        # dropped by torch.distributed.checkpoint.
        state = super().state_dict()
        state["param_groups"][0][_STATE_KEY] = {"engine": self.preconditioner.state_dict(), "skipped": self.skipped}
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`. The state may come from a model of another dtype, device or number of processes.

        Raises ValueError, and loads nothing, where it is of another optimizer, update rule, policy or model.
        """
        groups = state_dict["param_groups"]
        if not groups or _STATE_KEY not in groups[0]:
            raise ValueError(
                "this optimizer state was not written by FNGD, or flatten_optimizer_state_dict=True lost FNGD's part: "
                "resume with the optimizer that wrote it, or start from the checkpoint's model weights alone"
            )
        own = groups[0][_STATE_KEY]
        check_keys(own, ("engine", "skipped"))
        if own["engine"].get("sharing") not in GONE:  # which the engine refuses, by its name
            if own.get("norms") is not None:
                raise gone("update='momentum' and step_scale='rms'")
            state_dict, kept = with_frozen(state_dict, self.param_groups)
            check_groups(state_dict, kept)
        # Before torch's, which it must not leave half done: it may refuse the state.
        self.preconditioner.load_state_dict(own["engine"])
        groups = [
            # The layers' numbers, and the matrices, are those of this version.
            {key: value for key, value in stored.items() if key != _STATE_KEY}
            | {key: group[key] for key in ("layers", "matrices") if key in group}
            for stored, group in zip(state_dict["param_groups"], kept, strict=True)
        ]
        self.settings = in_force(self.settings, kept, groups)
        self.param_groups = kept
        super().load_state_dict({**state_dict, "param_groups": groups})
        self.preconditioner.positions.count = known_positions(self.param_groups)
        self.skipped = own["skipped"]


FNGD.param_groups = Misplaced(  # type: ignore[assignment]
    "this is the class FNGD, and no optimizer: pass optimizers=(FNGD(model), None) to Trainer, or "
    "optimizer_cls_and_kwargs=(FNGDFactory, {...})"
)
