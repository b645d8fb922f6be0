"""A run through Trainer, recorded step by step, against the dense float64 oracle.

What is recorded: every micro-batch as Trainer hands it to the model and the loss that it sends backward, every
parameter before a step, and every ``p.grad`` that the optimizer finds. `largest_error` then makes the same gradients
from the definitions: per-sample gradients of a float64 copy of the model, weights from `tests.reference.Dense` in
coefficient steps, and the rows that those left in shared steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_fngd import FNGD
from tests.modes.nets import Inputs, Kind, SampleLoss
from tests.reference import Dense, ReplayStore, per_sample_gradients

SAMPLES, BATCH = 12, 4
PER_EPOCH = SAMPLES // BATCH
# Low enough for weights that are far from 1, high enough for float32 to tell them.
DAMPING = 0.05


@dataclass
class MicroBatch:
    """What the model saw, and the loss that went backward (before any loss scaler)."""

    inputs: Inputs
    loss: float


@dataclass
class Step:
    """An optimizer step, as the optimizer found it.

    Attributes:
        computes: whether it was a coefficient step.
        batches: its micro-batches.
        parameters: by name, before the step.
        gradients: by name; those that a parameter got none for are left out.
        clip: the norm above which the gradient was clipped; infinity for none.
        ended_epoch: whether it was the last one of an epoch.
    """

    computes: bool
    batches: list[MicroBatch]
    parameters: dict[str, Tensor]
    gradients: dict[str, Tensor]
    clip: float = math.inf
    ended_epoch: bool = False


@dataclass
class Record:
    """The steps of a run, and the micro-batches of the step under way."""

    optimizer: FNGD | None = None
    model: nn.Module | None = None
    steps: list[Step] = field(default_factory=list)
    pending: list[MicroBatch] = field(default_factory=list)

    def batch(self, inputs: Inputs, loss: Tensor) -> None:
        """A micro-batch went forward and backward."""
        self.pending.append(MicroBatch(inputs, float(loss.detach())))

    def step(self, optimizer: Any, clip: float = math.inf) -> None:
        """The optimizer is about to step."""
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        self.model = self.optimizer.preconditioner.model  # which nobody else may keep alive
        parameters = dict(self.model.named_parameters())
        self.steps.append(
            Step(
                self.optimizer.preconditioner.phase.computes,
                self.pending,
                {name: p.detach().clone() for name, p in parameters.items()},
                {name: p.grad.detach().clone() for name, p in parameters.items() if p.grad is not None},
                clip,
            )
        )
        self.pending = []


class Recorder(TrainerCallback):
    """Fills a `Record` from Trainer's events."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.record.pending = []  # Trainer starts over after running out of memory

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.record.step(kwargs["optimizer"], args.max_grad_norm or math.inf)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.record.steps:
            self.record.steps[-1].ended_epoch = True


class Recording:
    """Mixed into a Trainer class: records its micro-batches."""

    record: Record

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        tensors = ("input_ids", "attention_mask", "labels")
        seen = {name: inputs[name].clone() for name in tensors if isinstance(inputs.get(name), Tensor)}
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        self.record.batch(seen, loss)
        return loss


class RecordingTrainer(Recording, Trainer):
    """Trainer, recorded."""


def arguments(folder: Path, cls: type[TrainingArguments] = TrainingArguments, **changes: Any) -> TrainingArguments:
    """Two epochs of three batches of four, with nothing switched on."""
    values = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 2,
        "max_grad_norm": 0.0,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return cls(**(values | changes))


def optimizer_arguments(sharing: str, **changes: Any) -> dict[str, Any]:
    """FNGD's: all coefficients come from the first epoch, and updates are large enough to move the model."""
    return {"lr": 1e-2, "damping": DAMPING, "sharing": sharing, "refresh": 0, "update": "adam"} | changes


def train(
    kind: Kind,
    sharing: str,
    folder: Path,
    *,
    model: nn.Module | None = None,
    samples: int = SAMPLES,
    data: Any = None,
    callbacks: Iterable[TrainerCallback] = (),
    **changes: Any,
) -> Record:
    """A recorded run through Trainer; ``changes`` are `TrainingArguments`."""
    model = kind.make() if model is None else model
    trainer = RecordingTrainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=kind.data(samples) if data is None else data,
        optimizers=(FNGD(model, **optimizer_arguments(sharing)), None),
    )
    return run(trainer, callbacks)


def run(trainer: Any, callbacks: Iterable[TrainerCallback] = (), record: Record | None = None) -> Record:
    """Train with a trainer of a `Recording` class."""
    trainer.record = Record() if record is None else record
    if record is None:
        trainer.add_callback(Recorder(trainer.record))
    for callback in callbacks:
        trainer.add_callback(callback)
    with mock.patch("gc.collect"):  # Accelerate's, which goes through all that a test session imported
        trainer.train()
    return trainer.record


# The comparison ------------------------------------------------------------------------------------------


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
    stores = {layer.name: ReplayStore() for layer in record.optimizer.preconditioner.layers}
    rest = set(record.optimizer.coverage().weighed)
    found, place = Difference(), 0
    for step in record.steps:
        load(model, step.parameters)
        exact, plain = expected(model, step, stores, rest, place, loss or kind.loss, smoothing)
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


def expected(
    model: nn.Module,
    step: Step,
    stores: dict[str, ReplayStore],
    rest: set[str],
    place: int,
    loss: SampleLoss,
    smoothing: float,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradients that a step has to find, and the plain ones."""
    parameters = {name: p for name, p in model.named_parameters() if name in step.gradients}
    exact = {name: torch.zeros_like(p) for name, p in parameters.items()}
    plain = {name: torch.zeros_like(p) for name, p in parameters.items()}
    sizes = [len(batch.inputs["input_ids"]) for batch in step.batches]
    ones = [torch.ones(size, dtype=torch.float64) for size in sizes]
    # Outside of the preconditioned layers: the mean of theirs. A coefficient step knows no weight of its own yet.
    means = ones if step.computes else [mean_weights(stores, place + offset, w) for offset, w in enumerate(ones)]
    for offset, (batch, size) in enumerate(zip(step.batches, sizes, strict=True)):

        def alone(model: nn.Module, n: int, batch: MicroBatch = batch) -> Tensor:
            return loss(model, {key: value[n : n + 1] for key, value in batch.inputs.items()}, smoothing)

        u = per_sample_gradients(model, list(parameters.values()), alone, size)
        with torch.no_grad():
            factor = batch.loss / float(loss(model, batch.inputs, smoothing))
        rows = dict(zip(parameters, u.split([p.numel() for p in parameters.values()]), strict=True))
        for layer, store in stores.items():
            names = [name for name in rows if name.rpartition(".")[0] == layer]
            if step.computes:
                w = Dense(torch.cat([rows[name] for name in names]), DAMPING).w
                store.put(place + offset, w, w)
            else:
                w = store.get(place + offset, ones[offset])
            for name in names:
                exact[name] += (factor * rows[name] @ w).view_as(exact[name])
        for name, of_samples in rows.items():
            plain[name] += (factor * of_samples.sum(dim=1)).view_as(plain[name])
            if name.rpartition(".")[0] not in stores:
                w = means[offset] if name in rest else ones[offset]
                exact[name] += (factor * of_samples @ w).view_as(exact[name])
    return exact, plain


def mean_weights(stores: Mapping[str, ReplayStore], place: int, ones: Tensor) -> Tensor:
    """The weights that earlier steps left for a micro-batch, averaged over the layers."""
    return torch.stack([store.get(place, ones) if store.rows else ones for store in stores.values()]).mean(dim=0)
