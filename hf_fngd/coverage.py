"""The coverage report: which parameters are preconditioned, which are not, and why."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hf_fngd.backward import LayerSlot
from hf_fngd.rest import INPUT_HAS_GRADIENT, RestSlot
from hf_fngd.selection import Selected, Selection

logger = logging.getLogger(__name__)

NEVER_CALLED = "it was never called in a forward pass of the model in training mode"


@dataclass(frozen=True)
class CoverageReport:
    """What became of every trainable parameter of a model.

    Attributes:
        preconditioned: names of the parameters whose gradient is the weighted sum.
        plain: name to reason, for those that get a plain gradient by their kind.
        missed: name to reason, for those of selected layers that could not be preconditioned in some or all
            steps so far.
        weighed: names of the parameters of embeddings, first convolutions and tied heads whose samples are weighed.
    """

    preconditioned: tuple[str, ...]
    plain: dict[str, str]
    missed: dict[str, str]
    weighed: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"FNGD preconditions {len(self.preconditioned)} parameters."]
        if self.weighed:
            lines[0] = f"{lines[0][:-1]}, and weighs the samples in {', '.join(self.weighed)}."
        for title, group in (("plain gradient", self.plain), ("could not be preconditioned", self.missed)):
            reasons: dict[str, list[str]] = {}
            for name, reason in group.items():
                reasons.setdefault(reason, []).append(name)
            for reason, names in reasons.items():
                shown = ", ".join(names[:4]) + (f", and {len(names) - 4} more" if len(names) > 4 else "")
                lines.append(f"{len(names)} {title}: {reason} ({shown})")
        return "\n  ".join(lines)


class Coverage:
    """Follows what becomes of a model's parameters; tells it after the first step, and when more layers are missed.

    Args:
        selection: the layers that were selected.
        slots: what backward keeps of them, in the same order.
        rest: what it keeps of the modules outside of them.
        strict: raise, instead of warning, where a selected layer is missed.
    """

    def __init__(
        self, selection: Selection, slots: Sequence[LayerSlot], rest: Sequence[RestSlot], strict: bool
    ) -> None:
        self._selection, self._slots, self._rest, self._strict = selection, slots, rest, strict
        self._told = False
        self._told_fallbacks = 0

    def report(self) -> CoverageReport:
        """What became of every trainable parameter; before the first step, what is going to."""
        preconditioned: list[str] = []
        missed: dict[str, str] = {}
        for layer, slot in zip(self._selection.layers, self._slots, strict=True):
            names = _parameters(layer)
            reasons = sorted(slot.fallbacks)
            if self._told and not reasons and not slot.preconditioned:
                reasons = [NEVER_CALLED]
            if reasons:
                missed.update(dict.fromkeys(names, "; ".join(reasons)))
            else:
                preconditioned += names
        plain, weighed = dict(self._selection.plain), list[str]()
        for rest in self._rest:
            reasons = rest.reasons
            if self._told and rest.convolves and not rest.reached:
                reasons = [*reasons, INPUT_HAS_GRADIENT]
            if reasons:
                plain.update(dict.fromkeys(_parameters(rest), "; ".join(reasons)))
            else:
                weighed += _parameters(rest)
        plain = {name: reason for name, reason in plain.items() if name not in weighed}
        return CoverageReport(tuple(preconditioned), plain, missed, tuple(weighed))

    def tell(self, samples: int) -> None:
        """A step was taken: log the report, if it is the first or says more than the last one.

        Args:
            samples: those that the weights compare: of the step's largest micro-batch, or of all of them.

        Raises:
            RuntimeError: ``strict``, and a selected layer is missed.
        """
        if samples == 1 and not self._told:
            logger.warning(
                "the first micro-batch holds one sample, whose weight is 1: with such batches FNGD is its update rule "
                "alone. Packed sequences count as one sample: train without packing, or raise "
                'per_device_train_batch_size or, with sharing="clipped", gradient_accumulation_steps'
            )
        fallbacks = sum(len(slot.fallbacks) for slot in self._slots)
        if self._told and fallbacks == self._told_fallbacks:
            return
        self._told, self._told_fallbacks = True, fallbacks
        report = self.report()
        if not report.missed:
            logger.info("%s", report)
        elif self._strict:
            raise RuntimeError(f"strict=True: {report}\nExclude these layers with exclude_modules.")
        else:
            logger.warning("%s", report)

    def tell_of_none(self) -> None:
        """A step was taken without a backward pass through any layer: say so, if there are gradients all the same.

        Raises:
            RuntimeError: ``strict``, and there are.
        """
        if not self._told and self._has_nonzero_gradients():
            self.tell(0)

    def _has_nonzero_gradients(self) -> bool:
        # Zero gradients are those of a checkpoint loader that initializes the optimizer's state.
        weights = (layer.module.weight for layer in self._selection.layers)
        grads = (w.grad for w in weights if isinstance(w, Tensor) and w.is_leaf)
        return any(isinstance(grad, Tensor) and bool(grad.any()) for grad in grads)


def _parameters(owner: Selected | RestSlot) -> list[str]:
    """The names of a module's own trained parameters."""
    return [
        f"{owner.name}.{leaf}" if owner.name else leaf
        for leaf, parameter in owner.module.named_parameters(recurse=False)
        if parameter.requires_grad
    ]
