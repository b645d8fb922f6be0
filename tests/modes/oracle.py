"""The gradients of a recorded run, made from their definitions in float64.

Per-sample gradients of a float64 copy of the model; sample weights from `tests.reference.Dense` in coefficient steps,
and the rows that those left in shared steps; or, with the default sharing, from the norms (`tests.reference.Clipping`).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.modes.harness import DAMPING, MicroBatch, Record, Step
from tests.modes.nets import POSITIONS, Kind, SampleLoss
from tests.reference import Clipping, Dense, ReplayStore, per_sample_gradients, uses_of


@dataclass
class Difference:
    """How far a run's gradients are from the oracle's.

    Attributes:
        error: the largest relative distance of any layer's gradient in any step; infinite where one is not finite.
        contrast: that of a preconditioned layer's plain gradient, which shows what the weights do.
        coefficient_steps: how many steps computed coefficients.
        shared_steps: how many used stored ones.
        clipped: in how many steps the norm was above the threshold.
    """

    error: float = 0.0
    contrast: float = 0.0
    coefficient_steps: int = 0
    shared_steps: int = 0
    clipped: int = 0


def compare(
    kind: Kind,
    record: Record,
    *,
    make: Callable[[], nn.Module] | None = None,
    loss: SampleLoss | None = None,
    smoothing: float = 0.0,
    inspected: bool = False,
) -> Difference:
    """The recorded gradients of every layer against the oracle's: weighted where the run says so, else plain.

    Args:
        kind: of the model.
        record: of the run.
        make: a plain model of the same structure, `Kind.make` where not given.
        loss: of samples, `Kind.loss` where not given.
        smoothing: of the labels.
        inspected: whether there was a forward pass before the record begins; in the first, tables of positions are
            plain.
    """
    assert record.optimizer is not None
    model = (make or kind.make)().double()
    engine = record.optimizer.preconditioner
    stores = {layer.name: ReplayStore() for layer in engine.layers}
    report = record.optimizer.coverage()
    weighed = dict.fromkeys(name.rpartition(".")[0] for name in (*report.preconditioned, *report.weighed))
    clipping, found, place = Clipping(), Difference(), 0
    for step in record.steps:
        load(model, step.parameters)
        micro_batches = list(measured(model, step, loss or kind.loss, smoothing))
        if engine.policy.name == "clipped":
            exact, plain = clipped(model, micro_batches, list(weighed), clipping, inspected)
        else:
            exact, plain = expected(micro_batches, step.computes, stores, place)
        inspected = True
        assert step.gradients.keys() == exact.keys()
        norm = float(flat(exact, exact).norm())
        factor = min(1.0, step.clip / (norm + 1e-6))
        for layer in {name.rpartition(".")[0] for name in exact}:
            names = [name for name in exact if name.rpartition(".")[0] == layer]
            target = factor * flat(exact, names)
            error = float((flat(step.gradients, names) - target).norm() / target.norm())
            found.error = max(found.error, error if math.isfinite(error) else math.inf)
            if layer in stores:
                contrast = float((factor * flat(plain, names) - target).norm() / target.norm())
                found.contrast = max(found.contrast, contrast)
        place += len(step.batches)
        found.clipped += factor < 1
        found.coefficient_steps += step.computes
        found.shared_steps += not step.computes
        if step.ended_epoch:
            place = 0
    return found


def flat(gradients: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    """Those named, one after the other, in float64."""
    return torch.cat([gradients[name].double().flatten() for name in names])


def load(model: nn.Module, parameters: dict[str, Tensor]) -> None:
    """Give a model the recorded values."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(parameters[name])
            p.requires_grad_(True)


@dataclass
class Measured:
    """A micro-batch, sample by sample.

    Attributes:
        alone: the loss of a sample that runs through the model alone.
        rows: the samples' gradients ``[p, N]`` by parameter.
        factor: between the loss that went backward and theirs.
        size: number of samples N.
    """

    alone: Callable[[nn.Module, int], Tensor]
    rows: dict[str, Tensor]
    factor: float
    size: int

    @property
    def plain(self) -> dict[str, Tensor]:
        """The sums over the samples, by parameter."""
        return {name: self.factor * row.sum(dim=1) for name, row in self.rows.items()}


def measured(model: nn.Module, step: Step, loss: SampleLoss, smoothing: float) -> Iterable[Measured]:
    """A step's micro-batches."""
    parameters = {name: p for name, p in model.named_parameters() if name in step.gradients}
    for batch in step.batches:
        size = len(batch.inputs["input_ids"])

        def alone(model: nn.Module, n: int, batch: MicroBatch = batch) -> Tensor:
            return loss(model, {key: value[n : n + 1] for key, value in batch.inputs.items()}, smoothing)

        u = per_sample_gradients(model, list(parameters.values()), alone, size)
        with torch.no_grad():
            factor = batch.loss / float(loss(model, batch.inputs, smoothing))
        rows = dict(zip(parameters, u.split([p.numel() for p in parameters.values()]), strict=True))
        yield Measured(alone, rows, factor, size)


Gradients = dict[str, Tensor]


def expected(
    micro_batches: Sequence[Measured], computes: bool, stores: dict[str, ReplayStore], place: int
) -> tuple[Gradients, Gradients]:
    """The gradients that a step has to find, flat, and the plain ones."""
    parts: list[Gradients] = []
    for offset, batch in enumerate(micro_batches):
        part = batch.plain
        for layer, store in stores.items():
            names = [name for name in batch.rows if name.rpartition(".")[0] == layer]
            if computes:
                store.put(place + offset, Dense(torch.cat([batch.rows[name] for name in names]), DAMPING).w)
            w = store.get(place + offset, batch.size)
            part |= {name: batch.factor * batch.rows[name] @ w for name in names}
        parts.append(part)
    return total(parts), total([batch.plain for batch in micro_batches])


def clipped(
    model: nn.Module, micro_batches: Sequence[Measured], modules: Sequence[str], clipping: Clipping, inspected: bool
) -> tuple[Gradients, Gradients]:
    """Those of ``sharing="clipped"``."""
    parts: list[Gradients] = []
    norms: list[dict[str, Tensor]] = []
    for batch in micro_batches:
        own = [name for name in modules if inspected or not is_table(model.get_submodule(name))]
        samples = [uses_of(model, own, batch.alone, n, batch.rows) for n in range(batch.size)]
        part, of_batch = clipping.gradients(samples, batch.factor)
        parts.append(batch.plain | part)
        norms.append(of_batch)
        inspected = True
    clipping.close(norms)
    return total(parts), total([batch.plain for batch in micro_batches])


def is_table(module: nn.Module) -> bool:
    """Whether it is a table of positions, by its size, which no other has here."""
    return isinstance(module, nn.Embedding) and module.num_embeddings == POSITIONS


def total(parts: Sequence[Gradients]) -> Gradients:
    """The sums over micro-batches, by parameter."""
    return {name: torch.stack([part[name] for part in parts]).sum(dim=0) for name in parts[0]}
