"""FNGD: the preconditioner and an update rule, as one torch optimizer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from hf_fngd.arguments import validate
from hf_fngd.coefficients import damping_from_gradient
from hf_fngd.coverage import CoverageReport
from hf_fngd.groups import check_parameters, parameter_groups
from hf_fngd.persample import accumulation_dtype
from hf_fngd.phase import schedule
from hf_fngd.preconditioner import FNGDPreconditioner
from hf_fngd.rules import FALLBACK_RULES, RULES, Settings
from hf_fngd.selection import Modules
from hf_fngd.sharded import local
from hf_fngd.sharing import SharingPolicy, Suspects
from hf_fngd.state import check_groups, check_keys
from hf_fngd.step_scale import StepScale, of_layers, squared_norms, usable

logger = logging.getLogger(__name__)

_STATE_KEY = "fngd"


class FNGD(torch.optim.Optimizer):
    """Inverse-free fast natural gradient descent (arXiv 2403.03473).

    The gradients of Linear and Conv1D layers arrive as weighted sums of the samples' gradients, from the backward pass
    itself: those of Eq. 9, ``p = lambda' (F + lambda I)^-1 g``, where the sharing policy solves for them, or, by
    default, weights that know the samples' norms alone (`hf_fngd.sharing.ClippedSharing`). `step` applies an update
    rule to them, and the fallback rule to everything else (embeddings, norms, tied heads). Construct it on the model
    that is trained, before or without wrapping it for distributed training.

    A step in which a gradient is NaN, infinite or too large to be squared in float32 is skipped whole: parameters,
    moments, coefficients and phase stay as they were, and the attribute ``skipped`` counts it (with FNGDCallback, also
    the steps that a loss scaler skips).

    Args:
        model: the module that is called with the batch.
        lr: learning rate. With update "muon" or "adam" the root mean square of an update is about 0.2 to 1
            times lr; with "momentum" see ``step_scale``.
        momentum: decay of the first moment, in [0, 1).
        damping: alpha of Eq. 14, dimensionless: lambda = alpha ||K||_F. Infinity would be plain averaging. Of no
            effect on the weights of "clipped" and "uniform".
        weight_decay: decoupled; biases and norms are not decayed.
        sharing: a policy's name, ``"clipped" | "ranked" | "index" | "replay" | "last" | "never" | "sketched" |
            "uniform"``, or an object.
        refresh: optimizer steps between coefficient steps after the first phase; 0: none (the paper's); None: 50, and 0
            where neither the policy solves for weights ("clipped", "uniform" do not) nor update "momentum" scales by
            rho.
        coefficient_steps: cap of the first phase, which ends with the first epoch at the latest and of which every step
            is a coefficient step, in optimizer steps; None: 100, and no first phase where refresh would be 0.
        step_scale: scale of a layer's gradient under update "momentum" (the other updates are scale-free).
            ``"rms"``: ``sqrt(size) / sqrt(rho mean(||p||^2))``, so that lr is the root mean square of an update
            at rho = 1, whatever the layer's width and the damping. ``"ngd"``: the paper's ``1/lambda'`` (at other
            weights than those of Eq. 9 a bound of it), within a trust region: no layer's update has a root mean square
            above lr. Both before momentum, which makes ``1 / (1 - momentum)`` of it where gradients agree. "ngd"
            measures ``||p||`` on ``p.grad`` and so wants gradients that are not clipped (Trainer: ``max_grad_norm=0``).
        update: rule of the preconditioned layers, ``"momentum" | "adam" | "muon"``.
        fallback: rule of all other parameters, ``"adamw"`` or ``"sgd"`` (the paper's plain gradient).
        fallback_lr: its learning rate; None: lr.
        beta2: decay of the second moment of "adam" and "adamw".
        eps: their denominator's floor.
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
        RuntimeError: the model is attached to another FNGD.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        momentum: float = 0.9,
        damping: float = 0.1,
        weight_decay: float = 0.0,
        *,
        sharing: str | SharingPolicy = "clipped",
        refresh: int | None = None,
        coefficient_steps: int | None = None,
        step_scale: str = "rms",
        update: str = "muon",
        fallback: str = "adamw",
        fallback_lr: float | None = None,
        beta2: float = 0.999,
        eps: float = 1e-8,
        memory_budget: int = 2**28,
        target_modules: Modules = "all-linear",
        exclude_modules: Modules = None,
        weigh_rest: bool = True,
        strict: bool = False,
    ) -> None:
        validate(
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "step_scale": step_scale,
                "update": update,
                "fallback": fallback,
                "fallback_lr": fallback_lr,
                "beta2": beta2,
                "eps": eps,
            }
        )
        if update == "momentum":  # whose step scale needs rho
            coefficient_steps, refresh = schedule(coefficient_steps, refresh, serve=True)
        self.preconditioner = FNGDPreconditioner(
            model,
            damping,
            sharing=sharing,
            refresh=refresh,
            coefficient_steps=coefficient_steps,
            memory_budget=memory_budget,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            weigh_rest=weigh_rest,
            strict=strict,
        )
        self.step_scale = step_scale
        self._scale = StepScale(step_scale, damping)
        self._update = update
        self._checked = False
        self.skipped = 0
        groups = parameter_groups(
            model,
            self.preconditioner.layers,
            lr=lr,
            weight_decay=weight_decay,
            update=update,
            fallback=FALLBACK_RULES[fallback],
            fallback_lr=lr if fallback_lr is None else fallback_lr,
        )
        super().__init__(groups, {"lr": lr, "momentum": momentum, "beta2": beta2, "eps": eps})

    @classmethod
    def from_config(cls, model: nn.Module, config: Any, **overrides: Any) -> Self:
        """Build the optimizer that an `FNGDConfig` describes; ``overrides`` are arguments of `FNGD`."""
        return cls(model, **(config.optimizer_arguments() | overrides))

    @classmethod
    def from_training_args(cls, model: nn.Module, args: Any, config: Any = None, **overrides: Any) -> Self:
        """Build from `TrainingArguments`, whose ``learning_rate`` and ``weight_decay`` win over the config's.

        Warns where ``step_scale="ngd"`` meets gradient clipping. ``overrides`` are arguments of `FNGD` and win over
        all.
        """
        arguments = {"lr": args.learning_rate, "weight_decay": args.weight_decay} | overrides
        optimizer = cls(model, **arguments) if config is None else cls.from_config(model, config, **arguments)
        if optimizer.step_scale == "ngd" and (args.max_grad_norm or 0) > 0:
            warnings.warn(
                'step_scale="ngd" takes its step from the size of the gradient, which '
                f"max_grad_norm={args.max_grad_norm} changes: set max_grad_norm=0 in TrainingArguments (the step has a "
                "trust region of its own)",
                stacklevel=2,
            )
        return optimizer

    def __getstate__(self) -> dict[str, Any]:
        """Refuse, where torch's would leave the preconditioner out.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "FNGD cannot be copied or pickled, it belongs to one model: save its state_dict(), and build another one "
            "on the copy of the model"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Torch's, for the groups that FNGD makes of the model itself.

        Raises:
            ValueError: the group is a user's; FNGD needs the model to tell what to precondition.
        """
        if "rule" not in param_group:
            raise ValueError(
                "FNGD makes its parameter groups from the model: add the parameters to the model, then build FNGD anew"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters from their ``grad``.

        Args:
            closure: evaluates the model anew and returns the loss; its backward is the one that counts.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: in the first step, where the optimizer's parameters are not the model's trainable
                ones, no gradient reached any of them, or one is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._checked:
            check_parameters(self.preconditioner.model, self.param_groups)
            self._checked = True
        squared = squared_norms(self.param_groups)
        if squared is not None and not usable(squared):
            self.preconditioner.skip()
            self._report_skip()
            return loss
        self.preconditioner.step()
        scales = None
        if squared is not None and self._update == "momentum":
            norms, sizes = of_layers(squared, self.param_groups, len(self.preconditioner.layers))
            scales = self._scale(norms, sizes, self.preconditioner.rho, self.preconditioner.spread)
        for group in self.param_groups:
            self._update_group(group, scales)
        return loss

    def _update_group(self, group: dict[str, Any], scales: Tensor | None) -> None:
        rule = RULES[group["rule"]]
        live = [place for place, p in enumerate(group["params"]) if p.grad is not None]
        if not live:
            return
        params: list[Tensor] = [group["params"][place] for place in live]
        grads: list[Tensor] = [local(p.grad) for p in params if p.grad is not None]
        if scales is not None and group["layers"]:
            factors = scales.unbind()
            of_layer = [factors[group["layers"][place]] for place in live]
            grads = [_scaled(g, factor) for g, factor in zip(grads, of_layer, strict=True)]
        states = [self.state[p] for p in params]
        for state, p in zip(states, params, strict=True):
            if not state:
                state["step"] = 0
                state.update({name: torch.zeros_like(p) for name in rule.state})
            state["step"] += 1
        rule.update(
            [local(p) for p in params],
            grads,
            [[local(state[name]) for state in states] for name in rule.state],
            [state["step"] for state in states],
            Settings(**{field: group[field] for field in ("lr", "momentum", "beta2", "eps", "weight_decay")}),
            params,
        )

    def _report_skip(self) -> None:
        self.skipped += 1
        if self.skipped & (self.skipped - 1) == 0:  # at powers of two, not to fill the log
            logger.warning(
                "FNGD skipped a step, %d so far: a gradient was NaN, infinite or too large to be squared; look for "
                "bad samples or a learning rate that is too high",
                self.skipped,
            )

    # Passed on -------------------------------------------------------------------------------------------

    def end_epoch(self) -> None:
        """Say that an epoch ended: in a plain loop, after its last `step`. Trainer needs no such call."""
        self.preconditioner.end_epoch()

    def detach(self) -> None:
        """Restore the model; see `FNGDPreconditioner.detach`."""
        self.preconditioner.detach()

    def coverage(self) -> CoverageReport:
        """Which parameters are preconditioned, which are not, and why; complete once a step was done."""
        return self.preconditioner.coverage()

    def suspects(self) -> Suspects:
        """Which samples got low weights, as wrong labels often do; see `FNGDPreconditioner.suspects`."""
        return self.preconditioner.suspects()

    @torch.no_grad()
    def diagnostics(self) -> dict[str, float]:
        """`FNGDPreconditioner.diagnostics`, ``skipped``, and ``lambda``, the geometric mean over the layers.

        There is no lambda where neither the policy ("clipped", "uniform") nor ``step_scale`` has use for it. Call it
        between `step` and ``zero_grad``: lambda is measured on ``p.grad``. Clipping makes it smaller, by the square of
        the factor; so does averaging over accumulated micro-batches, since rho is that of one. Under FSDP2 all
        processes have to call it.
        """
        own = self.preconditioner.diagnostics() | {"skipped": float(self.skipped)}
        if not self.preconditioner.policy.natural and self.step_scale != "ngd":
            return own
        norms = squared_norms(self.param_groups)
        if norms is None:
            return own | {"lambda": float("nan")}
        squared, _ = of_layers(norms, self.param_groups, len(self.preconditioner.layers))
        damping = damping_from_gradient(self.preconditioner.rho.to(squared), squared, self.preconditioner.damping)
        known = damping[damping > 0]
        mean = float(known.log().mean().exp()) if known.numel() else float("nan")
        return own | {"lambda": mean}

    # State -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Torch's, with FNGD's own state in the first parameter group.

        There, unlike in the per-parameter state, nothing is cast to the parameters' dtype on loading, and
        nothing is dropped by torch.distributed.checkpoint. Loads with ``weights_only=True``.
        """
        state = super().state_dict()
        state["param_groups"][0][_STATE_KEY] = {
            "engine": self.preconditioner.state_dict(),
            "norms": self._scale.norms,
            "skipped": self.skipped,
        }
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`. The state may come from a model of another dtype, device or number of processes.

        Raises:
            ValueError: the state is not FNGD's, or of another update rule, sharing policy or model; nothing of it was
                loaded.
        """
        groups = state_dict["param_groups"]
        if not groups or _STATE_KEY not in groups[0]:
            raise ValueError(
                "this optimizer state was not written by FNGD: resume with the optimizer that wrote it, or start "
                "from the checkpoint's model weights alone"
            )
        own = groups[0][_STATE_KEY]
        check_keys(own, ("engine", "norms", "skipped"))
        check_groups(state_dict, self.param_groups)
        # Before torch's, which it must not leave half done: it may refuse the state.
        self.preconditioner.load_state_dict(own["engine"])
        first = {key: value for key, value in groups[0].items() if key != _STATE_KEY}
        super().load_state_dict({**state_dict, "param_groups": [first, *groups[1:]]})
        self._scale.norms = None if own["norms"] is None else own["norms"].clone()
        self.skipped = own["skipped"]


def _scaled(g: Tensor, factor: Tensor) -> Tensor:
    """A gradient times a factor that half precision may not hold."""
    dtype = accumulation_dtype(g.dtype)
    return (g.to(dtype) * factor.to(g.device, dtype)).to(g.dtype)
