"""The gradients of a recorded run, made from their definitions in float64.

Per-sample gradients of a float64 copy of the model; weights from `tests.reference.Dense` in coefficient steps, and the
rows that those left in shared steps; or, with the default sharing, from the norms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tests.modes.harness import DAMPING, MicroBatch, Record, Step
from tests.modes.nets import Kind, SampleLoss
from tests.reference import Dense, ReplayStore, per_sample_gradients


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
) -> Difference:
    """The recorded gradients of every layer against the oracle's: weighted, by the layer's own weights where it is
    preconditioned and by their mean over the layers where the run says so, else plain.

    Args:
        kind: of the model.
        record: of the run.
        make: a plain model of the same structure, `Kind.make` where not given.
        loss: of samples, `Kind.loss` where not given.
        smoothing: of the labels.
    """
    assert record.optimizer is not None
    model = (make or kind.make)().double()
    engine = record.optimizer.preconditioner
    stores = {layer.name: ReplayStore() for layer in engine.layers}
    rest = set(record.optimizer.coverage().weighed)
    uses = [slot.name for slot in engine.rest if not slot.reasons]
    norms = Norms()
    found, place = Difference(), 0
    for step in record.steps:
        load(model, step.parameters)
        micro_batches = list(measured(model, step, loss or kind.loss, smoothing))
        if engine.policy.name == "clipped":
            exact, plain = clipped(model, micro_batches, list(stores), uses, norms)
        else:
            exact, plain = expected(micro_batches, step.computes, stores, rest, place)
        assert step.gradients.keys() == exact.keys()
        norm = float(flat(exact, exact).norm())
        factor = min(1.0, step.clip / (norm + 1e-6))
        for layer in {name.rpartition(".")[0] for name in exact}:
            names = [name for name in exact if name.rpartition(".")[0] == layer]
            target = factor * flat(exact, names)
            error = float((flat(step.gradients, names) - target).norm() / target.norm())
            found.error = max(found.error, error if math.isfinite(error) else math.inf)
            if layer in stores:
                found.contrast = max(
                    found.contrast, float((factor * flat(plain, names) - target).norm() / target.norm())
                )
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
    micro_batches: Sequence[Measured], computes: bool, stores: dict[str, ReplayStore], rest: set[str], place: int
) -> tuple[Gradients, Gradients]:
    """The gradients that a step has to find, flat, and the plain ones."""
    ones = [torch.ones(batch.size, dtype=torch.float64) for batch in micro_batches]
    # Outside of the preconditioned layers: the mean of theirs. A coefficient step knows no weight of its own yet.
    means = ones if computes else [mean_weights(stores, place + offset, w) for offset, w in enumerate(ones)]
    parts: list[Gradients] = []
    for offset, batch in enumerate(micro_batches):
        weights = {}
        for layer, store in stores.items():
            names = [name for name in batch.rows if name.rpartition(".")[0] == layer]
            if computes:
                weights[layer] = Dense(torch.cat([batch.rows[name] for name in names]), DAMPING).w
                store.put(place + offset, weights[layer], weights[layer])
            else:
                weights[layer] = store.get(place + offset, ones[offset])
        weights |= dict.fromkeys(rest, means[offset])
        parts.append(
            {
                name: batch.factor * row @ weights.get(name, weights.get(name.rpartition(".")[0], ones[offset]))
                for name, row in batch.rows.items()
            }
        )
    return total(parts), total([batch.plain for batch in micro_batches])


@dataclass
class Norms:
    """What ``sharing="clipped"`` knows of a step's other micro-batches: those of the last step.

    Attributes:
        parts: how many micro-batches a step has.
        means: mean norms of the last step that had as many, by module.
        shorter: whether the last step had fewer; a second one counts.
    """

    parts: int = 1
    means: dict[str, float] = field(default_factory=dict)
    shorter: bool = False

    def add(self, norms: Sequence[Mapping[str, Tensor]]) -> None:
        """A step is over: its micro-batches' norms, by module."""
        if len(norms) < self.parts and not self.shorter:
            self.shorter = True
            return
        self.parts, self.shorter = len(norms), False
        self.means = {module: float(torch.cat([batch[module] for batch in norms]).mean()) for module in norms[0]}


def clipped(
    model: nn.Module, micro_batches: Sequence[Measured], layers: Sequence[str], rest: Sequence[str], last: Norms
) -> tuple[Gradients, Gradients]:
    """Those of ``sharing="clipped"``, each use by its norms: ``||a_n|| ||g_n||`` in layers, else ``||g_n||``."""
    parts: list[Gradients] = []
    found: list[dict[str, Tensor]] = []
    for batch in micro_batches:
        samples = [uses_of(model, [*layers, *rest], batch, n) for n in range(batch.size)]
        part: Gradients = {}
        found.append({})
        for module in samples[0]:
            uses = [sample[module] for sample in samples]
            norms = torch.tensor([use.output_norm * (use.input_norm if module in layers else 1.0) for use in uses])
            norms = batch.factor * norms
            found[-1][module], mean = norms, float(norms.mean())
            if module in last.means:
                mean = (mean + (last.parts - 1) * last.means[module]) / last.parts
            w = (mean / norms).clamp(max=1).double()
            for name in uses[0].gradients:
                own = batch.factor * torch.stack([use.gradients[name] for use in uses], dim=1) @ w
                part[name] = part[name] + own if name in part else own
        parts.append(batch.plain | part)
    last.add(found)
    return total(parts), total([batch.plain for batch in micro_batches])


@dataclass
class Use:
    """A sample's call of a module.

    Attributes:
        input_norm: of its input, with a column of ones for a trained bias.
        output_norm: of its output gradient.
        gradients: its part of each parameter's gradient, flat.
    """

    input_norm: float
    output_norm: float
    gradients: Gradients


def uses_of(model: nn.Module, modules: Sequence[str], batch: Measured, n: int) -> dict[str, Use]:
    """The calls of modules in the forward pass of one sample, by name."""
    names = {id(p): name for name, p in model.named_parameters() if name in batch.rows}
    caught: dict[str, tuple[Tensor, Tensor]] = {}

    def catch(name: str) -> Callable[..., None]:
        return lambda module, args, output: caught.__setitem__(name, (args[0], output))

    handles = [model.get_submodule(name).register_forward_hook(catch(name)) for name in modules]
    value = batch.alone(model, n)
    for handle in handles:
        handle.remove()
    output_gradients = torch.autograd.grad(value, [output for _, output in caught.values()])
    found = {}
    for (name, (a, _)), g in zip(caught.items(), output_gradients, strict=True):
        module, a = model.get_submodule(name), a.detach()
        trained = [p for p in module.parameters(recurse=False) if id(p) in names]
        ones = a[..., 0].numel() if any(p is getattr(module, "bias", None) for p in trained) else 0
        gradients = torch.autograd.grad(module(a), trained, g)
        found[name] = Use(
            math.sqrt(float(a.double().square().sum()) + ones),
            float(g.norm()),
            {names[id(p)]: gradient.flatten() for p, gradient in zip(trained, gradients, strict=True)},
        )
    return found


def total(parts: Sequence[Gradients]) -> Gradients:
    """The sums over micro-batches, by parameter."""
    return {name: torch.stack([part[name] for part in parts]).sum(dim=0) for name in parts[0]}


def mean_weights(stores: Mapping[str, ReplayStore], place: int, ones: Tensor) -> Tensor:
    """The weights that earlier steps left for a micro-batch, averaged over the layers."""
    return torch.stack([store.get(place, ones) if store.rows else ones for store in stores.values()]).mean(dim=0)
