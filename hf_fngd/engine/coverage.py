"""The coverage report: which parameters are preconditioned or weighed, which are plain, and why."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hf_fngd.engine.gradients import Gradients
from hf_fngd.engine.layer import Layer
from hf_fngd.engine.reasons import CLIPPED_BEHIND, COUPLED, NEVER_CALLED
from hf_fngd.layers.modules import is_frozen
from hf_fngd.layers.select import Selection

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CoverageReport:
    """What happens to every trainable parameter of a model. Parameters go by their names.

    Attributes:
        preconditioned: parameters of Linear, Conv1D and convolution layers. Their samples are weighed, and the update
            rule steps them.
        weighed: all other parameters whose samples are weighed; the fallback rule steps them.
        plain: parameters whose samples are not weighed, and why; the fallback rule steps them unless the reason says
            otherwise. Before a layer that the note names, that layer's sample weights scale their gradients.
        missed: parameters of Linear, Conv1D and convolution layers that had a plain gradient in some or all steps
            though they should not, and why.
        note: where the sizes of tensors alone told the samples apart, BatchNorms that could not be seen, and remarks of
            the optimizer; often empty.
    """

    preconditioned: tuple[str, ...]
    plain: dict[str, str]
    missed: dict[str, str]
    weighed: tuple[str, ...] = ()
    note: str = field(default="", compare=False)

    def __str__(self) -> str:
        lines = [f"FNGD preconditions {len(self.preconditioned)} parameters."]
        if self.weighed:
            lines[0] = f"{lines[0][:-1]}, and weighs the samples in {listed(self.weighed)}."
        for title, group in (("plain gradient", self.plain), ("could not be weighed", self.missed)):
            reasons: dict[str, list[str]] = {}
            for name, reason in group.items():
                reasons.setdefault(reason, []).append(name)
            lines += [f"{len(names)} {title}: {reason} ({listed(names)})" for reason, names in reasons.items()]
        return "\n  ".join([*lines, self.note] if self.note else lines)


def listed(names: Sequence[str]) -> str:
    """The first four names, and how many more there are."""
    return ", ".join(names[:4]) + (f", and {len(names) - 4} more" if len(names) > 4 else "")


class Coverage:
    """Makes the coverage report, and logs it after the first step and whenever more layers are missed.

    With ``strict`` an attached layer that is not weighed is an error. ``compares`` says whether sample weights
    depend on other samples, so that a batch of one is too small.
    """

    def __init__(self, selection: Selection, layers: Sequence[Layer], strict: bool, compares: bool) -> None:
        self._selection, self._layers, self._strict, self._compares = selection, layers, strict, compares
        self._told = False
        self._said = set[tuple[int, str]]()  # what the reports in the log said of layers, by their places
        self._gradients = Gradients()  # of the last step
        self.notes: Sequence[Callable[[], str]] = ()
        self.stepped: frozenset[str] = frozenset()  # plain parameters that the update rule steps all the same
        self.fallback: frozenset[str] = frozenset()  # parameters that the fallback rule steps, output heads included

    def report(self) -> CoverageReport:
        """What happens to every trainable parameter; before the first step, what is expected to."""
        preconditioned: list[str] = []
        heads: list[str] = []
        weighed: dict[str, None] = {}
        missed: dict[str, str] = {}
        plain, stepped, told_of_rules = dict(self._selection.plain), set(self.stepped), self.stepped | self.fallback
        clipping = self._clipping()
        for layer in self._layers:
            if is_frozen(layer.selected.module):
                continue
            names, matrix, reasons = layer.selected.parameters, layer.selected.preconditioned, _reasons(layer, clipping)
            unreached = layer.shared.unreached and not layer.shared.ever
            if not reasons and not layer.weighed and unreached:
                reasons = [NEVER_CALLED]
            if reasons == [CLIPPED_BEHIND]:
                plain.update(dict.fromkeys(names, CLIPPED_BEHIND))
                stepped |= {name for name in names if told_of_rules and name not in self.fallback}
            elif reasons:
                (missed if matrix else plain).update(dict.fromkeys(names, "; ".join(reasons)))
            else:
                heads += [name for name in names if matrix and name in self.fallback]
                preconditioned += [name for name in names if matrix and name not in self.fallback]
                weighed.update(dict.fromkeys(name for name in names if not matrix or name in self.fallback))
        plain = {
            name: f"{reason}, and the update rule steps it" if name in stepped else reason
            for name, reason in plain.items()
            if name not in weighed
        }
        told = f"The fallback rule steps {listed(heads)}, as an output head or a depthwise filter" if heads else ""
        note = "\n  ".join(
            filter(None, (*(note() for note in self.notes), told, self._scaled(), self._differentiated()))
        )
        return CoverageReport(tuple(preconditioned), plain, missed, tuple(weighed), note)

    def _clipping(self) -> list[str]:
        """The names of the layers behind BatchNorms that clip for all before them."""
        layers = [layer.selected for layer in self._layers if layer.clips_all]
        return [one.parameters[0] for one in layers if not is_frozen(one.module)]

    def _scaled(self) -> str:
        names = self._clipping()
        return f"The sample weights of {listed(names)} also scale the gradients of everything before" if names else ""

    def _differentiated(self) -> str:
        names = [layer.selected.parameters[0] for layer in self._layers if layer.differentiated and layer.weighed]
        if not names:
            return ""
        return (
            "What the weights get from differentiating a gradient of the model's inputs (create_graph=True, as for a "
            f"gradient penalty) is plain ({listed(names)})"
        )

    def tell(self, samples: int, begun: int, live: Sequence[Layer]) -> None:
        """After a step: log the report if it says more than before.

        Args:
            samples: how many samples the step's sample weights compared with each other.
            begun: how many micro-batches have begun since the last step.
            live: the layers that are trained, or once were.

        Raises:
            RuntimeError: with ``strict`` a layer is not weighed.
        """
        again = self._gradients.unchanged(live)
        self._gradients.note(live)
        if again and not begun:
            return  # another optimizer steps by them: its parameters are a part of the model
        for layer in live:
            layer.close()
        for layer in live:
            layer.shared.reached = False
        clipping = self._clipping()
        found = {layer.place: _reasons(layer, clipping) for layer in live}
        reasons = {(place, reason) for place, of_layer in found.items() for reason in of_layer}
        if not (self._told or reasons or samples):
            return  # a step without gradients
        if samples == 1 and self._compares and not self._told:
            logger.warning(
                "the first micro-batch holds one sample, whose sample weight is 1: with such batches FNGD is its "
                "update rule alone. A packed row is one sample unless position_ids that restart, cu_seq_lens or "
                "sample_ids tell its samples apart; otherwise raise per_device_train_batch_size or, with "
                'sharing="clipped", gradient_accumulation_steps'
            )
        said = reasons | {(layer.place, "differentiated") for layer in live if layer.differentiated}
        if self._told and said <= self._said:
            return
        worse, self._told = self._told, True
        self._said |= said
        report = self.report()
        faults = [layer for layer in live if found[layer.place] not in ([], [CLIPPED_BEHIND])]
        if faults and self._strict:
            raise RuntimeError(f"strict=True: {report}\nExclude these layers with exclude_modules.")
        # An output head that no batch has used is reported, but is no reason for a warning.
        missed = any(layer.selected.preconditioned for layer in faults)
        logger.log(logging.WARNING if missed or worse else logging.INFO, "%s", report)


def _reasons(layer: Layer, clipping: Sequence[str]) -> list[str]:
    """Why a layer is plain; what clipped for it may be frozen by now."""
    return [COUPLED] if layer.reasons == [CLIPPED_BEHIND] and not clipping else layer.reasons
