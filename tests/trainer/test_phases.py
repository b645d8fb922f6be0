"""The exact steps in which coefficients are computed, for every kind of run, with and without FNGDCallback.

Epochs have four steps (of batches of four) where a row says nothing else. Without the callback the end of an epoch is
what Accelerate's data loaders show; where they show nothing, the cap ends the first phase.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.state import GradientState
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from hf_fngd import FNGD, FNGDCallback
from hf_fngd.weights.base import MicroBatchWeights
from hf_fngd.weights.replay import ReplaySharing
from tests.modes.harness import OutOfMemory, Stream, arguments
from tests.modes.nets import bert, classification_data

BATCH = 4


class Watched(ReplaySharing):
    """Notes in which optimizer steps coefficients are computed."""

    def __init__(self) -> None:
        self.noted: list[int] = []

    def begin(self, size: int, offset: int) -> MicroBatchWeights:
        if self.computes and self.steps not in self.noted:
            self.noted.append(self.steps)
        return super().begin(size, offset)


class Run:
    """A model, its optimizer, and Trainers on them.

    Attributes:
        folder: for checkpoints.
        told: whether FNGDCallback is among the callbacks.
        cap: `coefficient_steps`.
    """

    other: Trainer | None = None

    def __init__(self, folder: Path, told: bool, cap: int | None = None) -> None:
        self.folder, self.told, self.cap = folder, told, cap
        self.renew()

    def renew(self) -> None:
        """A new model and its optimizer."""
        self.model, self.policy = bert(num_hidden_layers=1), Watched()
        arguments = {"coefficient_steps": self.cap, "update": "adam"}
        self.optimizer = FNGD(self.model, lr=1e-3, sharing=self.policy, **arguments)

    def trainer(self, samples: int = 16, data: Any = None, callbacks: Any = (), **changes: Any) -> Trainer:
        return Trainer(
            model=self.model,
            args=arguments(self.folder, **({"num_train_epochs": 3} | changes)),
            train_dataset=classification_data(samples) if data is None else data,
            eval_dataset=classification_data(6),
            optimizers=(self.optimizer, None),
            callbacks=[*callbacks, *([FNGDCallback()] if self.told else [])],
        )

    def train(self, **changes: Any) -> None:
        self.trainer(**changes).train()


Drive = Callable[[Run], None]


def trains(**changes: Any) -> Drive:
    return lambda run: run.train(**changes)


def streams(samples: int = 16, **changes: Any) -> Drive:
    return trains(max_steps=9, data=Stream(list(classification_data(samples))), **changes)


def resumes(step: int) -> Drive:
    """A new process goes on from a checkpoint of a run that was stopped there."""

    def drive(run: Run) -> None:
        first = Run(run.folder, run.told, run.cap)
        first.train(save_strategy="steps", save_steps=step)
        run.trainer().train(resume_from_checkpoint=str(run.folder / f"checkpoint-{step}"))

    return drive


class Pull(TrainerCallback):
    """Takes a batch from another prepared loader before every step, or all of them before the second."""

    def __init__(self, run: Run, samples: int, at_once: bool) -> None:
        self.samples, self.at_once = samples, at_once
        self.trainer = run.trainer(callbacks=[self])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.batches = iter(self.trainer.accelerator.prepare(DataLoader(torch.arange(self.samples), batch_size=1)))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.at_once:
            next(self.batches, None)
        elif state.global_step == 1:
            assert len(list(self.batches)) == self.samples


def pulls(samples: int, at_once: bool = False) -> Drive:
    return lambda run: Pull(run, samples, at_once).trainer.train()


class Skip(TrainerCallback):
    """Does as a loss scaler that found an overflow in the fourth step: the optimizer never hears of it."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.patch = mock.patch.object(kwargs["optimizer"], "step")
        if state.global_step == 3:
            self.patch.start()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            self.patch.stop()


def runs_out_of_memory(step: int) -> Drive:
    """In the backward of that step; Trainer starts over with batches of three, six steps an epoch."""

    def drive(run: Run) -> None:
        failure = OutOfMemory(run.optimizer.preconditioner.layers[2].module, step)
        run.train(callbacks=[failure], auto_find_batch_size=True)
        assert failure.raised

    return drive


def trains_twice(first: dict[str, Any], second: dict[str, Any]) -> Drive:
    """On one optimizer."""
    return lambda run: (run.train(**first), run.train(**second))[0]


def loops(optimizer: FNGD, model: nn.Module, steps: int, epoch: int = 0) -> None:
    """A plain loop over a plain loader."""
    rows = classification_data(BATCH * steps).with_format("torch")
    for step, inputs in enumerate(DataLoader(rows, batch_size=BATCH), start=1):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if epoch and step % epoch == 0:
            optimizer.end_epoch()


def another_trainer_runs(run: Run) -> None:
    """For one epoch, on a model of its own, whose loader's flag stays up afterwards."""
    run.other = Run(run.folder, run.told).trainer(num_train_epochs=1)
    run.other.train()
    assert GradientState().end_of_dataloader


def loops_after_a_trainer(epoch: int) -> Drive:
    def drive(run: Run) -> None:
        another_trainer_runs(run)
        run.renew()
        loops(run.optimizer, run.model, 8, epoch)

    return drive


def loops_around_a_trainer(run: Run) -> None:
    """The other run comes between two steps of the plain loop."""
    loops(run.optimizer, run.model, 2)
    another_trainer_runs(run)
    loops(run.optimizer, run.model, 6)


def goes_on_in_a_loop(run: Run) -> None:
    """The same optimizer, after less than an epoch."""
    run.train(max_steps=2)
    loops(run.optimizer, run.model, 6)


def first(steps: int) -> list[int]:
    return list(range(steps))


@dataclass(frozen=True)
class Row:
    """A kind of run.

    Attributes:
        drive: does it.
        alone: the coefficient steps without the callback.
        told: with it; None for the same ones.
        cap: `coefficient_steps`.
    """

    drive: Drive
    alone: list[int]
    told: list[int] | None = None
    cap: int | None = None


ROWS = {
    "three epochs": Row(trains(), first(4)),
    "three epochs, a lower cap": Row(trains(), first(3), cap=3),
    "a last batch of another size": Row(trains(samples=18), first(5)),
    "dataloader_drop_last": Row(trains(samples=18, dataloader_drop_last=True), first(4)),
    "accumulation": Row(trains(gradient_accumulation_steps=2), first(2)),
    "accumulation with a remainder": Row(trains(samples=20, gradient_accumulation_steps=2), first(3)),
    "accumulation of all batches": Row(trains(gradient_accumulation_steps=4), first(1)),
    "accumulation of more batches than there are": Row(trains(gradient_accumulation_steps=8), first(1)),
    "evaluation in mid-epoch": Row(trains(eval_strategy="steps", eval_steps=3), first(4)),
    "evaluation at every step": Row(trains(eval_strategy="steps", eval_steps=1), first(4)),
    "evaluation at the end of an epoch": Row(trains(eval_strategy="epoch"), first(4)),
    "evaluation first": Row(trains(eval_strategy="epoch", eval_on_start=True), first(4)),
    "iterable dataset": Row(streams(), first(4)),
    "iterable dataset, a last batch of another size": Row(streams(18), first(5)),
    "iterable dataset with accumulation": Row(streams(gradient_accumulation_steps=2), first(2)),
    # Trainer takes no step with the fifth micro-batch, the last of the epoch: nobody sees the flag that comes with it.
    # Told of the end of the epoch, FNGD has computed the coefficients of that micro-batch all the same.
    "iterable dataset with accumulation and a remainder": Row(
        streams(20, gradient_accumulation_steps=2), first(9), first(3)
    ),
    "iterable dataset with accumulation and a remainder, a cap": Row(
        streams(20, gradient_accumulation_steps=2), first(6), first(3), cap=6
    ),
    "resumed in mid-epoch": Row(resumes(2), [2, 3]),
    "resumed after all but one step of an epoch": Row(resumes(3), [3]),
    "resumed at an epoch's end": Row(resumes(4), []),
    "resumed in the second epoch": Row(resumes(6), []),
    "max_steps in the second epoch": Row(trains(max_steps=6), first(4)),
    "less than an epoch": Row(trains(max_steps=3), first(3)),
    "less than an epoch, a lower cap": Row(trains(max_steps=3), first(2), cap=2),
    "one epoch": Row(trains(num_train_epochs=1), first(4)),
    "an epoch of one step": Row(trains(samples=4), first(1)),
    "a batch at a time from another prepared loader": Row(pulls(50), first(4)),
    # The end of any loader is taken for the end of the epoch, unless the loader is asked for more than there is.
    "the last batch of another prepared loader": Row(pulls(3), first(3)),
    "all batches of another prepared loader": Row(pulls(3, at_once=True), first(4)),
    "two train() calls": Row(trains_twice({"num_train_epochs": 1}, {"num_train_epochs": 2}), first(4)),
    # Trainer's own on_epoch_end comes at the end of every call; the flag of a loader does not.
    "two train() calls, the first less than an epoch": Row(trains_twice({"max_steps": 2}, {}), first(6), first(2)),
    # The next forward pass finds the epoch over.
    "the scaler skips the last step of the first epoch": Row(trains(callbacks=[Skip()]), first(4)),
    "out of memory in the first step": Row(runs_out_of_memory(0), first(6)),
    "out of memory in a later step": Row(runs_out_of_memory(2), first(2 + 6)),
    "out of memory in the last step of an epoch": Row(runs_out_of_memory(3), first(3 + 6)),
    "out of memory in the second epoch": Row(runs_out_of_memory(5), first(4)),
    "a plain loop after a Trainer run": Row(loops_after_a_trainer(0), first(8)),
    "a plain loop after a Trainer run, a cap": Row(loops_after_a_trainer(0), first(3), cap=3),
    "a plain loop after a Trainer run, with end_epoch()": Row(loops_after_a_trainer(2), first(2)),
    # Here, too, the flag of another loader came up since this optimizer's last step.
    "a plain loop around a Trainer run": Row(loops_around_a_trainer, first(3)),
    "a plain loop with the optimizer of a Trainer run": Row(goes_on_in_a_loop, first(8), first(2)),
}


@pytest.mark.parametrize("told", [False, True], ids=["alone", "told"])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_coefficients_are_computed_in_these_steps(row: Row, told: bool, tmp_path: Path) -> None:
    run = Run(tmp_path, told, row.cap)
    row.drive(run)
    expected = row.told if told and row.told is not None else row.alone
    assert run.policy.noted == expected


# Steps that are skipped: they are counted in the logs, and end epochs as others do ---------------------------


class Spoilt(Trainer):
    """Some of its batches, counted from one, have no finite loss."""

    batches = 0
    spoilt: tuple[int, ...] = ()

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.batches += 1
        value = super().compute_loss(*args, **kwargs)
        return value * torch.nan if self.batches in self.spoilt else value


def spoilt(folder: Path, batches: tuple[int, ...], callback: bool, **changes: Any) -> tuple[Spoilt, FNGD]:
    """Two epochs of three batches."""
    model = bert()
    optimizer = FNGD(model, sharing="replay")
    trainer = Spoilt(
        model=model,
        args=arguments(folder, logging_strategy="steps", logging_steps=1, **changes),
        train_dataset=classification_data(12),
        optimizers=(optimizer, None),
        callbacks=[FNGDCallback()] if callback else [],
    )
    trainer.spoilt = batches
    trainer.train()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    return trainer, optimizer


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_the_callback_logs_how_many_steps_were_skipped(max_grad_norm: float, tmp_path: Path) -> None:
    trainer, optimizer = spoilt(tmp_path, (2, 5), callback=True, max_grad_norm=max_grad_norm)
    logged = [entry["fngd_skipped"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [0, 1, 1, 1, 2, 2]
    assert optimizer.preconditioner.policy.steps == 4
    assert optimizer.preconditioner.policy.shared_since == 2


@pytest.mark.parametrize("callback", [False, True])
def test_an_epoch_ends_with_its_last_step_even_if_that_is_skipped(callback: bool, tmp_path: Path) -> None:
    _, optimizer = spoilt(tmp_path, (3,), callback)
    assert int(optimizer.skipped) == 1
    assert optimizer.preconditioner.policy.steps == 5
    assert optimizer.preconditioner.policy.shared_since == 2
