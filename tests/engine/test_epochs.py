"""The end of an epoch as Accelerate shows it; under Trainer, see tests/trainer/test_phases.py."""

import sys
from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader, TensorDataset

from hf_fngd import FNGD
from hf_fngd.engine.epochs import EpochEdge
from tests.nets import data, loss, net


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield Accelerator()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def loader(accelerator: Accelerator, samples: int = 8, batch_size: int = 2, **kwargs: object) -> DataLoader:
    return accelerator.prepare(DataLoader(TensorDataset(torch.arange(samples)), batch_size=batch_size, **kwargs))


def edges(batches: DataLoader, edge: EpochEdge, epochs: int, accumulation: int = 1) -> list[int]:
    """The numbers of the steps that saw an epoch end; a step is due as Trainer and Accelerate count them."""
    found, steps = [], 0
    for _ in range(epochs):
        for place, _batch in enumerate(batches, start=1):
            if place % accumulation == 0 or place == len(batches):
                steps += 1
                if edge.passed():
                    found.append(steps)
    return found


@pytest.mark.parametrize(
    ("samples", "batch_size", "drop_last", "accumulation", "expected"),
    [
        (8, 2, False, 1, [4, 8, 12]),
        (7, 2, False, 1, [4, 8, 12]),
        (7, 2, True, 1, [3, 6, 9]),
        (8, 2, False, 2, [2, 4, 6]),
        (10, 2, False, 2, [3, 6, 9]),  # a remainder of one micro-batch
        (10, 2, False, 4, [2, 4, 6]),
        (2, 2, False, 1, [1]),  # the flag never falls between two steps; one end is all that the phase needs
        (4, 2, False, 4, [1]),
    ],
)
def test_the_edge_comes_with_the_last_step_of_each_epoch(
    accelerator: Accelerator, samples: int, batch_size: int, drop_last: bool, accumulation: int, expected: list[int]
) -> None:
    batches = loader(accelerator, samples, batch_size, drop_last=drop_last)
    assert edges(batches, EpochEdge(), 3, accumulation) == expected


def test_a_flag_left_up_does_not_hide_the_end_of_another_loader(accelerator: Accelerator) -> None:
    stopped = iter(loader(accelerator, 4))
    next(stopped)
    next(stopped)  # the last batch, whose end nobody asks for
    assert GradientState().end_of_dataloader
    assert edges(loader(accelerator), EpochEdge(), 2) == [4, 8]


@pytest.mark.parametrize(
    ("samples", "accumulation", "epochs", "expected"),
    [(12, 1, 2, 4), (10, 1, 2, 4), (12, 2, 2, 2), (15, 2, 2, 3), (12, 1, 1, 4), (3, 1, 2, 1)],
)
def test_the_phase_ends_with_the_first_epoch_without_being_told(
    accelerator: Accelerator, samples: int, accumulation: int, epochs: int, expected: int
) -> None:
    model = net()
    batches = DataLoader(TensorDataset(*data(samples)), batch_size=3)
    accelerator.gradient_accumulation_steps = accumulation
    prepared, optimizer, batches = accelerator.prepare(model, FNGD(model, sharing="replay"), batches)
    policy = optimizer.optimizer.preconditioner.policy
    for _ in range(epochs):
        for x, y in batches:
            with accelerator.accumulate(prepared):
                optimizer.zero_grad()
                accelerator.backward(loss(prepared, x, y))
                optimizer.step()
    assert policy.shared_since == expected
    assert policy.steps == expected * epochs


def test_accelerate_is_neither_needed_nor_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    GradientState._reset_state()
    edge = EpochEdge()
    assert not edge.passed()
    assert GradientState._shared_state == {}
    monkeypatch.delitem(sys.modules, "accelerate.state")
    assert not edge.passed()
