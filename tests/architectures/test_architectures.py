"""Tiny models of many families: they train, the coverage report is right, and every gradient is what it says."""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_fngd import FNGD, FNGDPreconditioner
from hf_fngd.engine.reasons import CLIPPED_BEHIND
from hf_fngd.layers.base import find_kernel
from hf_fngd.layers.embedding import A_TABLE
from hf_fngd.samples.probe import EQUAL_ROWS
from tests.architectures.families import FAMILIES, Family
from tests.architectures.oracle import (
    PLAIN_TOLERANCE,
    Size,
    Verdict,
    captured,
    distance,
    gradients,
    judge,
    outcomes,
    sample,
    silent,
    verdicts,
)
from tests.architectures.registry import MISSED, POSITIONS, PRECONDITIONED, WEIGHED, kind, matches, to
from tests.architectures.table import FIRST, LONGER, SMALLER, TABLE, clipped, parse, tally
from tests.nets import EVERY_TYPE

SAMPLES = 5
REASONS = (*MISSED, A_TABLE, EQUAL_ROWS, CLIPPED_BEHIND)
COUNTED = ("preconditioned", "plain", "missed")

of_every_family = pytest.mark.parametrize("family", [pytest.param(one, id=name) for name, one in FAMILIES.items()])


@functools.cache
def judged(name: str, *sizes: Size, **options: Any) -> dict[str, Verdict]:
    return verdicts(FAMILIES[name], *sizes, **options)


def wrong(found: dict[str, Verdict]) -> dict[str, Verdict]:
    return {name: verdict for name, verdict in found.items() if not verdict.right}


def assert_expected(family: Family, found: dict[str, Verdict]) -> None:
    assert {name: verdict.outcome for name, verdict in found.items()} == {name: family.expected(name) for name in found}


# Training and coverage -----------------------------------------------------------------------------------


@of_every_family
def test_it_trains(family: Family) -> None:
    model = family.model(torch.float32)
    batch = to(torch.float32, family.batch(*FIRST))
    optimizer = FNGD(model, lr=1e-2, layer_types=EVERY_TYPE)
    losses = []
    for _ in range(8):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        with silent():
            optimizer.step()
        losses.append(float(loss.detach()))
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] - 0.01


@of_every_family
def test_the_report_names_every_trainable_parameter_once(family: Family) -> None:
    model = family.model()
    engine = FNGDPreconditioner(model, sharing="never")
    before = engine.coverage()
    model(**family.batch(*FIRST)).loss.backward()
    with silent():
        engine.step()
    every = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    for report in (before, engine.coverage()):
        groups = [set(report.preconditioned), set(report.plain), set(report.missed)]
        assert sum(map(len, groups)) == len(set.union(*groups)) == len(every)
        assert set.union(*groups) == set(every)
        # Under all of its names, a tied parameter is in one group.
        owners = [{id(every[name]) for name in group} for group in groups]
        assert sum(map(len, owners)) == len(set.union(*owners))
    found = outcomes(engine.coverage())
    assert found == {name: family.expected(name) for name in found}
    assert set(engine.coverage().missed.values()) <= set(MISSED)
    unused = [pattern for pattern in family.patterns() if not any(matches(pattern, name) for name in found)]
    assert not unused


def test_the_written_table_is_that_of_these_families() -> None:
    rows = parse(TABLE.read_text())
    assert list(rows) == list(FAMILIES)
    for name, family in FAMILIES.items():
        names = [key for key, parameter in family.model().named_parameters() if parameter.requires_grad]
        row, counts = rows[name], tally({key: family.expected(key) for key in names})
        assert row["tensors"] == str(len(names))
        assert tuple(int(row[column].split(":")[0]) for column in COUNTED) == counts
        assert int(row["clipped"]) == len(clipped(judged(name, FIRST, LONGER, sharing="clipped")))
        wrong = [cell != "right" for cell in row["N = T, first / later"].split(" / ")]
        assert wrong == [False, False]  # no batch deceives any


# Gradients -----------------------------------------------------------------------------------------------


@of_every_family
def test_every_gradient_is_what_the_report_says(family: Family) -> None:
    found = judged(family.name, FIRST)
    assert wrong(found) == {}
    # No weight could pass for both.
    shifts = [v.shift for name, v in found.items() if v.outcome == PRECONDITIONED and name.endswith("weight")]
    assert min(shifts, default=1.0) > 0.01
    assert_expected(family, found)


@of_every_family
def test_every_gradient_is_clipped_where_the_report_says_so(family: Family) -> None:
    # After a first batch, in which tables of positions are plain.
    found = judged(family.name, FIRST, LONGER, sharing="clipped")
    assert wrong(found) == {}
    shifts = [v.shift for v in found.values() if v.outcome in (PRECONDITIONED, WEIGHED)]
    assert max(shifts, default=1.0) > 0.01
    model = family.model()
    for name, verdict in found.items():
        if verdict.outcome not in (PRECONDITIONED, WEIGHED):
            owner = model.get_submodule(name.rpartition(".")[0])
            # Of the modules that have a layer type, those alone that the report has a reason for.
            assert find_kernel(owner)[1] is None or verdict.outcome in REASONS, (name, verdict.outcome)


OTHER_BATCHES: dict[str, Callable[[Family], tuple[Size, ...]]] = {
    "a smaller last one": lambda family: (FIRST, SMALLER),
    "a single sample": lambda family: ((1, POSITIONS),),  # the oracle's weights are one then
    "a first one of as many samples as positions": lambda family: ((family.square, family.square),),
    "a later one of as many samples as positions": lambda family: (FIRST, (family.square, family.square)),
}


@pytest.mark.parametrize("sizes", OTHER_BATCHES.values(), ids=OTHER_BATCHES)
@of_every_family
def test_batches_of_other_sizes_have_the_weights_of_their_own_samples(
    family: Family, sizes: Callable[[Family], tuple[Size, ...]]
) -> None:
    found = judged(family.name, *sizes(family))
    assert wrong(found) == {}
    if sizes(family)[0] == FIRST:  # which tells samples and positions apart
        assert_expected(family, found)


# The oracle itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Whisper"])
def test_captured_shares_are_the_gradients_of_samples_alone(name: str) -> None:
    family = FAMILIES[name]
    model, batch = family.model(), family.batch(*FIRST)
    layers = [layer.name for layer in FNGDPreconditioner(copy.deepcopy(model)).layers]
    u = captured(model, batch, layers)
    assert {key.rpartition(".")[0] for key in u} == set(layers)
    for n in range(SAMPLES):
        alone = gradients(model, sample(batch, n))
        for key, columns in u.items():
            assert distance(key, columns[:, n].view_as(alone[key]), alone) < PLAIN_TOLERANCE


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.oracle == "captured"])
def test_where_shares_are_captured_the_samples_interact(name: str) -> None:
    family = FAMILIES[name]
    model, batch = family.model(), family.batch(*FIRST)
    together = gradients(model, batch)
    alone = [gradients(model, sample(batch, n)) for n in range(SAMPLES)]
    errors = [distance(key, sum(of[key] for of in alone) / SAMPLES, together) for key in together]
    assert max(errors) > 1e-3


@pytest.mark.parametrize("outcome", [PRECONDITIONED, MISSED[0]])
def test_a_wrong_gradient_is_found(outcome: str) -> None:
    expected = {"layer.weight": torch.ones(2, 3, dtype=torch.float64), "layer.bias": torch.zeros(2)}
    other = {key: torch.full_like(value, 7) for key, value in expected.items()}
    pair = (other, expected) if outcome == PRECONDITIONED else (expected, other)
    assert judge("layer.weight", outcome, expected["layer.weight"].clone(), *pair).right
    assert not judge("layer.weight", outcome, expected["layer.weight"] + 1e-5, *pair).right
    assert not judge("layer.weight", outcome, None, *pair).right
    assert not judge("layer.bias", outcome, expected["layer.bias"] + 1e-5, *pair).right


def test_an_expectation_is_by_pattern_or_by_type_and_not_ambiguous() -> None:
    family = dataclasses.replace(FAMILIES["Llama"], outcomes={PRECONDITIONED: "a.* b.(x|y)", MISSED[0]: "**.x"})
    assert family.expected("a.layer.weight") == family.expected("b.y") == PRECONDITIONED
    assert family.expected("c.d.x.bias") == MISSED[0]
    assert family.expected("model.norm.weight") == kind("LlamaRMSNorm")
    for name in ("b.x", "x"):
        with pytest.raises(LookupError):
            family.expected(name)
