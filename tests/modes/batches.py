"""Modes that change which batches there are, how many make a step, and where a run begins and ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from hf_fngd import FNGD
from tests.modes.harness import (
    BATCH,
    PER_EPOCH,
    SAMPLES,
    Record,
    Recorder,
    RecordingTrainer,
    arguments,
    optimizer_arguments,
    run,
    train,
)
from tests.modes.nets import LENGTH, PADDING, Kind
from tests.modes.registry import checked, mode


def sizes(record: Record) -> list[list[int]]:
    """The batch sizes of each step."""
    return [[len(batch.inputs["input_ids"]) for batch in step.batches] for step in record.steps]


@mode("gradient accumulation 2")
def accumulation(kind: Kind, sharing: str, folder: Path) -> float:
    record = train(kind, sharing, folder, samples=16, gradient_accumulation_steps=2)
    assert sizes(record) == [[4, 4]] * 4
    return checked(kind, sharing, record)


@mode("gradient accumulation 2, with a remainder")
def accumulation_with_remainder(kind: Kind, sharing: str, folder: Path) -> float:
    record = train(kind, sharing, folder, gradient_accumulation_steps=2)
    assert sizes(record) == [[4, 4], [4]] * 2
    return checked(kind, sharing, record)


@mode("gradient accumulation 4, with a remainder")
def accumulation_of_four(kind: Kind, sharing: str, folder: Path) -> float:
    record = train(kind, sharing, folder, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert sizes(record) == [[2, 2, 2, 2], [2, 2]] * 2
    return checked(kind, sharing, record)


@mode("dataloader_drop_last=False, a last batch of another size")
def keep_last(kind: Kind, sharing: str, folder: Path) -> float:
    record = train(kind, sharing, folder, samples=SAMPLES + 2)
    assert sizes(record) == [[4], [4], [4], [2]] * 2
    return checked(kind, sharing, record)


@mode("dataloader_drop_last=True")
def drop_last(kind: Kind, sharing: str, folder: Path) -> float:
    record = train(kind, sharing, folder, samples=SAMPLES + 2, dataloader_drop_last=True)
    assert sizes(record) == [[4], [4], [4]] * 2
    return checked(kind, sharing, record)


def padded(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch as long as its longest sample."""
    longest = max(len(sample["input_ids"]) for sample in samples)

    def stack(values: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([value + [filler] * (longest - len(value)) for value in values])

    labels = [sample["labels"] for sample in samples]
    return {
        "input_ids": stack([sample["input_ids"] for sample in samples], PADDING),
        "attention_mask": stack([[1] * len(sample["input_ids"]) for sample in samples], 0),
        "labels": stack(labels, -100) if isinstance(labels[0], list) else torch.tensor(labels),
    }


@mode('train_sampling_strategy="group_by_length"')
def grouped_by_length(kind: Kind, sharing: str, folder: Path) -> float:
    def cut(sample: dict[str, Any], number: int) -> dict[str, Any]:
        length = LENGTH - 5 * number % 7
        labels = sample["labels"]
        return {
            "input_ids": sample["input_ids"][:length],
            "labels": labels[:length] if isinstance(labels, list) else labels,
        }

    model = kind.make()
    trainer = RecordingTrainer(
        model=model,
        args=arguments(folder, train_sampling_strategy="group_by_length"),
        train_dataset=kind.data(SAMPLES).map(cut, with_indices=True),
        data_collator=padded,
        optimizers=(FNGD(model, **optimizer_arguments(sharing)), None),
    )
    record = run(trainer)
    assert len({step.batches[0].inputs["input_ids"].shape[1] for step in record.steps}) > 1
    return checked(kind, sharing, record)


class Stream(IterableDataset[dict[str, Any]]):
    """A data set that does not know its length."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from self.rows


@mode("iterable dataset without length")
def iterable(kind: Kind, sharing: str, folder: Path) -> float:
    record = train(kind, sharing, folder, data=Stream(kind.data(SAMPLES)), max_steps=2 * PER_EPOCH)
    assert sizes(record) == [[4]] * 6
    return checked(kind, sharing, record)


@mode("iterable dataset without length, gradient accumulation 2")
def iterable_with_accumulation(kind: Kind, sharing: str, folder: Path) -> float:
    """Nobody sees the end of the epoch: the cap ends the phase."""
    model = kind.make()
    trainer = RecordingTrainer(
        model=model,
        args=arguments(folder, max_steps=4, gradient_accumulation_steps=2),
        train_dataset=Stream(kind.data(16)),
        optimizers=(FNGD(model, **optimizer_arguments(sharing, coefficient_steps=2)), None),
    )
    record = run(trainer)
    assert sizes(record) == [[4, 4]] * 4
    return checked(kind, sharing, record)


@mode("max_steps shorter than an epoch")
def less_than_an_epoch(kind: Kind, sharing: str, folder: Path) -> float:
    record = train(kind, sharing, folder, max_steps=PER_EPOCH - 1)
    assert sizes(record) == [[4]] * 2
    return checked(kind, sharing, record, shares=False)


@mode("two train() calls")
def two_calls(kind: Kind, sharing: str, folder: Path) -> float:
    """The second one goes on with the optimizer of the first: all of it is shared."""
    model, record = kind.make(), Record()
    trainer = RecordingTrainer(
        model=model,
        args=arguments(folder, num_train_epochs=1),
        train_dataset=kind.data(SAMPLES),
        optimizers=(FNGD(model, **optimizer_arguments(sharing)), None),
        callbacks=[Recorder(record)],
    )
    run(trainer, record=record)
    run(trainer, record=record)
    assert len(record.steps) == 2 * PER_EPOCH
    return checked(kind, sharing, record)


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


def out_of_memory(kind: Kind, sharing: str, folder: Path, step: int) -> float:
    model = kind.make()
    optimizer = FNGD(model, **optimizer_arguments(sharing))
    trainer = RecordingTrainer(
        model=model,
        args=arguments(folder, auto_find_batch_size=True),
        train_dataset=kind.data(SAMPLES),
        optimizers=(optimizer, None),
    )
    failure = OutOfMemory(optimizer.preconditioner.layers[3].module, step)
    record = run(trainer, [failure])
    assert failure.raised
    assert sizes(record) == [[BATCH]] * step + [[3]] * 8  # Accelerate takes nine tenths of the batch size
    return checked(kind, sharing, record, inspected=step == 0)


@mode("auto_find_batch_size, out of memory in the first backward")
def out_of_memory_at_first(kind: Kind, sharing: str, folder: Path) -> float:
    return out_of_memory(kind, sharing, folder, 0)


@mode("auto_find_batch_size, out of memory in a later backward")
def out_of_memory_later(kind: Kind, sharing: str, folder: Path) -> float:
    return out_of_memory(kind, sharing, folder, 2)
