"""Which batches there are, how many make a step, where a run begins and ends."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.modes.harness import BATCH, PER_EPOCH, SAMPLES, OutOfMemory, recording, run, train
from tests.modes.nets import LENGTH, PADDING, Kind
from tests.modes.registry import Run, checked, mode, simple, sizes_of

HALVES = {"samples": 16, "gradient_accumulation_steps": 2}
mode("gradient accumulation 2")(simple([[4, 4]] * 4, **HALVES))
mode("gradient accumulation 2, with a remainder")(simple([[4, 4], [4]] * 2, gradient_accumulation_steps=2))
mode("gradient accumulation 4, with a remainder")(
    simple([[2, 2, 2, 2], [2, 2]] * 2, per_device_train_batch_size=2, gradient_accumulation_steps=4)
)
mode("dataloader_drop_last=False, a last batch of another size")(simple([[4], [4], [4], [2]] * 2, samples=14))
mode("dataloader_drop_last=True")(simple([[4], [4], [4]] * 2, samples=14, dataloader_drop_last=True))


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
        length, labels = LENGTH - 5 * number % 7, sample["labels"]
        return {
            "input_ids": sample["input_ids"][:length],
            "labels": labels[:length] if isinstance(labels, list) else labels,
        }

    data = kind.data(SAMPLES).map(cut, with_indices=True)
    options = {"collator": padded, "train_sampling_strategy": "group_by_length"}
    record = train(kind, sharing, folder, data=data, **options)
    assert len({step.batches[0].inputs["input_ids"].shape[1] for step in record.steps}) > 1
    return checked(kind, sharing, record)


mode("iterable dataset without length")(simple([[4]] * 6, samples=12, stream=True, max_steps=6))
# Nobody sees the end of the epoch: the cap ends the phase.
mode("iterable dataset without length, gradient accumulation 2")(
    simple([[4, 4]] * 4, stream=True, max_steps=4, fngd={"coefficient_steps": 2}, **HALVES)
)
mode("max_steps shorter than an epoch")(simple([[4]] * 2, max_steps=2, shares=False))


@mode("two train() calls")
def two_calls(kind: Kind, sharing: str, folder: Path) -> float:
    """The second one goes on with the optimizer of the first: all of it is shared."""
    trainer = recording(kind, sharing, folder, num_train_epochs=1)
    record = run(trainer)
    run(trainer, record=record)
    assert len(record.steps) == 2 * PER_EPOCH
    return checked(kind, sharing, record)


def out_of_memory(step: int) -> Run:
    def run(kind: Kind, sharing: str, folder: Path) -> float:
        model = kind.make()
        layers = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
        failure = OutOfMemory(layers[3], step)
        record = train(kind, sharing, folder, model=model, callbacks=[failure], auto_find_batch_size=True)
        assert failure.raised
        assert sizes_of(record) == [[BATCH]] * step + [[3]] * 8  # Accelerate takes nine tenths of the batch size
        return checked(kind, sharing, record, inspected=step == 0)

    return run


mode("auto_find_batch_size, out of memory in the first backward")(out_of_memory(0))
mode("auto_find_batch_size, out of memory in a later backward")(out_of_memory(2))
