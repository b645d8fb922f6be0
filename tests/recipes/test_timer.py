"""The clock of the recipes: whole steps, and their parts."""

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from common.timer import PARTS, StepTimer, hardware
from common.trainer import RecipeTrainer
from tests.modes.harness import arguments


class Clock:
    """Time that passes by the work that is done, and by nothing else."""

    now = 0.0

    def spend(self, seconds):
        self.now += seconds


CLOCK = Clock()


@pytest.fixture(autouse=True)
def timed_by_the_clock(monkeypatch):
    monkeypatch.setattr("common.timer.time.perf_counter", lambda: CLOCK.now)


def step(timer, seconds=0, parts=()):
    """A step that takes its time before its parts."""
    timer.on_step_begin()
    CLOCK.spend(seconds)
    for part in parts:
        timer.end(part)
    timer.on_step_end()


class Slow(torch.autograd.Function):
    """Takes 1 second forward and 10 backward."""

    @staticmethod
    def forward(ctx, x):
        CLOCK.spend(1)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        CLOCK.spend(10)
        return grad


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x, labels=None):
        return {"loss": Slow.apply(self.weight).sum() * x.mean()}


class SlowSGD(torch.optim.SGD):
    """Takes 100 seconds a step."""

    def step(self, closure=None):
        CLOCK.spend(100)
        return super().step(closure)


class SlowCallback(TrainerCallback):
    """Takes 10,000 seconds at the end of a step, which is no time of the step."""

    def on_step_end(self, *args, **kwargs):
        CLOCK.spend(10_000)


class Rows(torch.utils.data.Dataset):
    """Takes 1,000 seconds to load a row, which is no time of a step."""

    def __len__(self):
        return 12

    def __getitem__(self, row):
        CLOCK.spend(1000)
        return {"x": torch.ones(1)}


@pytest.mark.parametrize("accumulation", [1, 3])
def test_parts_of_a_step_are_those_of_its_micro_batches(tmp_path, monkeypatch, accumulation):
    monkeypatch.setattr(StepTimer, "WARM_UP", 1)
    net = Net()
    sizes = {"max_steps": 3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation}
    evaluation = {"eval_strategy": "steps", "eval_steps": 1}  # forward passes that are no part of a step
    trainer = RecipeTrainer(
        model=net,
        args=arguments(tmp_path, **sizes, **evaluation),
        train_dataset=Rows(),
        eval_dataset=Rows(),
        optimizers=(SlowSGD(net.parameters(), lr=0.1), None),
        callbacks=[SlowCallback()],
    )
    trainer.train()
    report = trainer.timer.report()
    expected = {"forward": 1.0 * accumulation, "backward": 10.0 * accumulation, "update": 100.0}
    assert {part: report[f"step_seconds_{part}"] for part in PARTS} == expected
    assert len(trainer.timer.seconds) == 3
    assert report["step_seconds_mean"] == report["step_seconds_median"] == sum(expected.values())
    assert report["hardware"] == hardware()


def test_the_clock_waits_for_the_device(monkeypatch):
    monkeypatch.setattr("common.timer.torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("common.timer.torch.accelerator.synchronize", lambda: CLOCK.spend(5))
    monkeypatch.setattr(StepTimer, "WARM_UP", 0)
    timer = StepTimer()
    step(timer, parts=("forward", "backward"))
    assert timer.parts == [{"forward": 5.0, "backward": 5.0, "update": 5.0}]
    assert timer.seconds == [15.0]


def test_a_step_that_was_broken_off_leaves_nothing():
    timer = StepTimer()
    timer.on_step_begin()
    CLOCK.spend(7)
    timer.end("forward")  # and out of memory
    step(timer, parts=("forward", "backward"))
    assert timer.parts == [{"forward": 0.0, "backward": 0.0, "update": 0.0}]


def test_the_first_steps_are_skipped():
    timer = StepTimer()
    for _ in range(StepTimer.WARM_UP):
        step(timer, 100)
    assert timer.median() is None
    assert timer.mean() is None
    for seconds in (1, 2, 9):
        step(timer, seconds)
    assert timer.median() == 2
    assert timer.mean() == 4
    assert "step_seconds_forward" not in timer.report()  # nobody told it of parts


def test_hardware_names_the_device_or_the_threads(monkeypatch):
    monkeypatch.setattr("common.timer.torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("common.timer.torch.accelerator.is_available", lambda: False)
    assert hardware().endswith(f", {torch.get_num_threads()} thread(s)")
    monkeypatch.setattr("common.timer.torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("common.timer.torch.cuda.get_device_name", lambda: "A fast one")
    assert hardware() == "A fast one"
