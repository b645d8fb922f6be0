"""A run through Trainer, recorded step by step.

What is recorded: every micro-batch as Trainer hands it to the model and the loss that it sends backward, every
parameter before a step, and every ``p.grad`` that the optimizer finds. `tests.modes.oracle` makes the same gradients
from the definitions.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_fngd import FNGD
from tests.modes.nets import Inputs, Kind
from tests.nets import settings_of

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
                getattr(self.optimizer.preconditioner.policy, "computes", False),
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


class Stream(IterableDataset[dict[str, Any]]):
    """A data set that does not know its length."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from self.rows


class OutOfMemory(TrainerCallback):
    """Once, runs out of memory in the middle of the backward pass of a step's first micro-batch."""

    def __init__(self, layer: nn.Module, step: int) -> None:
        self.layer, self.step = layer, step
        self.raised = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and not self.raised:
            self.handle = self.layer.register_forward_hook(self._after_forward)

    def _after_forward(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        self.handle.remove()
        output.register_hook(self._in_backward)

    def _in_backward(self, gradient: Tensor) -> None:
        self.raised = True
        raise RuntimeError("CUDA out of memory. Tried to allocate more than there is.")


def arguments(folder: Path, cls: type[TrainingArguments] = TrainingArguments, **changes: Any) -> TrainingArguments:
    """Two epochs of three batches of four, with nothing switched on."""
    values = {"per_device_train_batch_size": BATCH, "num_train_epochs": 2, "max_grad_norm": 0.0, "seed": 3}
    values |= {"logging_strategy": "no", "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    values |= {"use_cpu": True, "dataloader_pin_memory": False}
    return cls(str(folder), **(values | changes))


def optimizer_arguments(sharing: str, **changes: Any) -> dict[str, Any]:
    """FNGD's, whose updates are large enough to move the model; of ``changes`` those that the policy reads."""
    return {"lr": 1e-2, "update": "adam"} | settings_of(sharing, damping=DAMPING, **changes)


def recording(
    kind: Kind,
    sharing: str,
    folder: Path,
    *,
    model: nn.Module | None = None,
    samples: int = SAMPLES,
    data: Any = None,
    collator: Any = None,
    fngd: dict[str, Any] | None = None,
    **changes: Any,
) -> RecordingTrainer:
    """A Trainer on a model of its own; ``changes`` are `TrainingArguments`."""
    model = kind.make() if model is None else model
    return RecordingTrainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=kind.data(samples) if data is None else data,
        data_collator=collator,
        optimizers=(FNGD(model, **optimizer_arguments(sharing, **(fngd or {}))), None),
    )


def train(kind: Kind, sharing: str, folder: Path, callbacks: Iterable[TrainerCallback] = (), **options: Any) -> Record:
    """A recorded run; ``options`` are those of `recording`."""
    return run(recording(kind, sharing, folder, **options), callbacks)


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
