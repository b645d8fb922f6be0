"""Replay: one row of sample weights for each micro-batch of the first epoch, and when that ends."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_fngd.weights.base import SharingPolicy
from hf_fngd.weights.replay import cycle_to, with_mean_one
from tests.reference import replay_fit
from tests.weights.harness import L, prepared, samples, step


def solved(seed: int, size: int = 8) -> Tensor:
    return torch.stack([of.solved() for of in samples(seed, size)])


def epoch(policy: SharingPolicy, *sizes: int, parts: int = 1) -> list[Tensor]:
    """The sample weights of an epoch, whose micro-batches hold the samples that their number in it tells."""
    batches = [samples(place, size) for place, size in enumerate(sizes)]
    found = [w for n in range(0, len(batches), parts) for w in step(policy, *batches[n : n + parts])]
    policy.end_epoch()
    return found


def check(found: list[Tensor], expected: list[Tensor]) -> None:
    for w, other in zip(found, expected, strict=True):
        torch.testing.assert_close(w, other)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_first_epochs_weights_come_again_in_order(parts: int) -> None:
    policy = prepared("replay")
    sizes = [8, 8, 8, 5]  # the last batch of an epoch is a short one
    first = epoch(policy, *sizes, parts=parts)
    check(first, [solved(place, size) for place, size in enumerate(sizes)])
    for _ in range(2):
        check(epoch(policy, *sizes, parts=parts), first)
    check(epoch(policy, *2 * [8, 8, 8, 5])[:4], first)  # a longer epoch begins anew
    check(epoch(policy, *[8, 8, 8, 5], 8)[4:], first[:1])


def test_a_cap_ends_the_first_epoch_early() -> None:
    policy = prepared("replay", coefficient_steps=2)
    first = epoch(policy, 8, 8, 8, 8, 8)
    check(first, [solved(0), solved(1), solved(0), solved(1), solved(0)])


def test_a_batch_of_another_size_takes_a_row_in_order_again_from_the_first() -> None:
    policy = prepared("replay")
    epoch(policy, 8)
    for size in (1, 2, 5, 8, 13):
        (w,) = step(policy, samples(9, size))
        torch.testing.assert_close(w, torch.stack([replay_fit(row, size) for row in solved(0)]))


def test_a_longer_batch_widens_the_store_and_a_short_one_gets_its_own_weights_back() -> None:
    policy = prepared("replay")
    first = epoch(policy, 5, 8, 13, 8)
    check(epoch(policy, 5, 8, 13, 8), first)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_longer_batch_beyond_the_capacity_takes_no_row_of_another(parts: int) -> None:
    policy = prepared("replay", coefficient_steps=1)
    sizes = [8, 13, 16][:parts]
    first = epoch(policy, *sizes, parts=parts)
    check(first, [solved(place, size) for place, size in enumerate(sizes)])
    check(epoch(policy, *sizes, parts=parts), first)


def test_layers_without_usable_coefficients_average() -> None:
    policy = prepared("replay")
    spoilt = samples(0)
    spoilt[1].u[0, 0] = torch.nan
    step(policy, spoilt)
    policy.end_epoch()
    (w,) = step(policy, samples(0))
    torch.testing.assert_close(w[[0, 2]], solved(0)[[0, 2]])
    assert torch.equal(w[1], torch.ones(8, dtype=torch.float64))


@pytest.mark.parametrize("affordable", [3, 10])
def test_the_oldest_rows_are_overwritten_where_memory_runs_out(affordable: int) -> None:
    policy = prepared("replay", memory_budget=affordable * L * 8 * 8)
    for place in range(affordable + 2):
        with pytest.warns(UserWarning, match="memory_budget") if place == affordable else nullcontext():
            step(policy, samples(place))
    assert policy.rows.untyped_storage().nbytes() <= affordable * L * 8 * 8
    policy.end_epoch()
    order = [affordable, affordable + 1, *range(2, affordable)]
    check([step(policy, samples(0))[0] for _ in order], [solved(seed) for seed in order])


def test_the_store_is_allocated_once_for_the_usual_epoch() -> None:
    policy = prepared("replay")
    pointers = set()
    for place in range(40):
        step(policy, samples(place))
        pointers.add(policy.rows.untyped_storage().data_ptr())
    assert len(pointers) == 1


def test_a_micro_batch_that_measured_nothing_averages_in_its_place() -> None:
    policy = prepared("replay")
    opened = [policy.begin(8, offset) for offset in range(3)]
    for batch in (opened[0], opened[2]):
        for place, of in enumerate(samples(7)):
            batch.weigh(place, of)
    policy.close(opened, 3, torch.empty(0, dtype=torch.float64))
    policy.end_epoch()
    found = [step(policy, samples(0))[0] for _ in range(3)]
    check(found, [solved(7), torch.ones(L, 8, dtype=torch.float64), solved(7)])


# When the first epoch ends ---------------------------------------------------------------------------------


def coefficient_steps(policy: SharingPolicy, steps: int, length: int | None = None) -> list[int]:
    """Those among the next steps."""
    computed = []
    for number in range(steps):
        computed += [number] if policy.computes else []
        step(policy, samples(number, 2))
        if length and (number + 1) % length == 0:
            policy.end_epoch()
    return computed


@pytest.mark.parametrize(
    ("cap", "length", "expected"), [(None, 4, 4), (100, 4, 4), (3, 4, 3), (4, 4, 4), (1, None, 1), (None, None, 12)]
)
def test_coefficient_steps_of_a_run(cap: int | None, length: int | None, expected: int) -> None:
    policy = prepared("replay", coefficient_steps=cap)
    assert coefficient_steps(policy, 12, length) == list(range(expected))
    assert policy.diagnostics()["phase"] == float(expected < 12)


def test_every_step_of_never_is_one() -> None:
    assert coefficient_steps(prepared("never"), 8, 3) == list(range(8))


def test_an_epoch_without_a_step_ends_nothing() -> None:
    policy = prepared("replay")
    policy.end_epoch()
    assert coefficient_steps(policy, 5, 3) == [0, 1, 2]


# Rows of another size --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [[-1.0, 0.5], [1.0, -0.99], [0.0, 0.0], [3.0, 0.2]])
def test_a_prefix_whose_weights_cancel_is_not_blown_up(prefix: list[float]) -> None:
    fitted = with_mean_one(cycle_to(torch.tensor([*prefix, 2.5, 2.0]), 2))
    assert fitted.mean() == pytest.approx(1)
    assert fitted.abs().max() <= 2 * max(map(abs, prefix)) + 1


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=12), st.integers(1, 20))
def test_weights_of_other_sizes_have_mean_one_and_stay_small(values: list[float], size: int) -> None:
    w = torch.tensor(values, dtype=torch.float64)
    w = w + (1 - w.mean())
    found = with_mean_one(cycle_to(w, size))
    assert found.shape == (size,)
    assert abs(float(found.mean()) - 1) < 1e-10
    # By a factor of 2 at most, and a shift by less than what that leaves of the largest.
    assert float(found.abs().max()) <= 4 * float(w.abs().max()) + 1
