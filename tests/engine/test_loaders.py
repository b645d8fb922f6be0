"""Several data loaders of Accelerate at once: which of them ends the first epoch."""

import itertools
import logging
from collections.abc import Iterable, Iterator

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader, TensorDataset

from hf_fngd import FNGD
from tests.nets import data, loss, net

SHORT, LONG = 3, 8


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def loader(accelerator: Accelerator, batches: int) -> DataLoader:
    return accelerator.prepare(DataLoader(TensorDataset(*data(2 * batches)), batch_size=2))


def again_and_again(batches: DataLoader) -> Iterator[list[torch.Tensor]]:
    while True:
        yield from batches


def first_epoch(optimizer: FNGD, model: torch.nn.Module, batches: Iterable[list[torch.Tensor]]) -> int | None:
    for x, y in batches:
        loss(model, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer.preconditioner.policy.shared_since


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "epochs_of(loader)" in record.getMessage()]


@pytest.mark.parametrize("lengths", [(SHORT, LONG), (LONG, SHORT)])
def test_two_loaders_in_step_end_together(accelerator: Accelerator, lengths: tuple[int, int]) -> None:
    model = net()
    optimizer = FNGD(model, sharing="replay")
    pairs = zip(*(loader(accelerator, length) for length in lengths), strict=False)
    assert first_epoch(optimizer, model, (one for one, _ in pairs)) == SHORT


@pytest.mark.parametrize("named", [False, True])
def test_a_short_loader_that_begins_anew(
    accelerator: Accelerator, named: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Its first end ends the epoch, and the log says how to change that."""
    model = net()
    optimizer, short, long = FNGD(model, sharing="replay"), loader(accelerator, SHORT), loader(accelerator, LONG)
    if named:
        optimizer.epochs_of(long)
    with caplog.at_level(logging.WARNING):
        pairs = [(pair for pair, _ in zip(long, again_and_again(short), strict=False)) for _ in range(2)]
        found = first_epoch(optimizer, model, itertools.chain(*pairs))
    assert found == (LONG if named else SHORT)
    assert len(told(caplog)) == (0 if named else 1)


@pytest.mark.parametrize("named", [False, True])
def test_an_evaluation_loader_under_way(
    accelerator: Accelerator, named: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A batch of it before each step."""
    model = net()
    optimizer, evaluation, train = FNGD(model, sharing="replay"), loader(accelerator, SHORT), loader(accelerator, LONG)
    if named:
        optimizer.epochs_of(train)
    batches = again_and_again(evaluation)

    def both() -> Iterator[list[torch.Tensor]]:
        for batch in train:
            next(batches)
            yield batch

    with caplog.at_level(logging.WARNING):
        assert first_epoch(optimizer, model, both()) == (LONG if named else SHORT)
    assert len(told(caplog)) == (0 if named else 1)


def test_a_whole_evaluation_between_two_steps_ends_nothing_and_policies_that_know_no_epoch_say_nothing(
    accelerator: Accelerator, caplog: pytest.LogCaptureFixture
) -> None:
    for sharing in ("replay", "clipped"):
        model = net()
        optimizer = FNGD(model, sharing=sharing)
        train, evaluation = loader(accelerator, LONG), loader(accelerator, SHORT)
        steps = (batch for batch in train if list(evaluation))
        with caplog.at_level(logging.WARNING):
            for x, y in steps:
                loss(model, x, y).backward()
                optimizer.step()
        if sharing == "replay":
            assert optimizer.preconditioner.policy.shared_since == LONG
    assert told(caplog) == []


def test_a_named_loader_that_is_gone_or_not_prepared(accelerator: Accelerator) -> None:
    model = net()
    optimizer = FNGD(model, sharing="replay")
    with pytest.raises(TypeError, match=r"a DataLoader does not show its end: pass .* accelerator.prepare"):
        optimizer.epochs_of(DataLoader([1, 2]))
    optimizer.epochs_of(loader(accelerator, LONG))
    accelerator.free_memory()
    assert first_epoch(optimizer, model, loader(accelerator, SHORT)) == SHORT
