"""Weights of embeddings and tied heads under checkpointing and torch.compile, in states and reports."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_fngd import FNGD
from hf_fngd.backward import ON_TOP_OF_ANOTHER
from hf_fngd.rest import A_TABLE
from tests.rest.setting import (
    LENGTH,
    PLAIN,
    TABLE,
    LanguageModel,
    after_a_coefficient_step,
    attach,
    batch,
    check,
    gradients,
    kept,
    losses,
    model,
    reasons,
    weighted,
)

# In other modes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_makes_no_difference(reentrant: bool) -> None:
    found = []
    for checkpointing in (None, reentrant):
        net = model(checkpointing=checkpointing)
        after_a_coefficient_step(net, sharing="ranked")
        losses(net, batch(6, seed=2)).mean().backward()
        found.append(gradients(net))
    check(found[1], found[0], TABLE, *PLAIN)


def test_reentrant_checkpointing_of_several_batches_at_once_is_plain() -> None:
    class Whole(LanguageModel):
        def forward(self, x: Tensor) -> Tensor:
            mark = torch.zeros((), requires_grad=True)  # reentrant checkpointing wants an input with a gradient
            y = checkpoint(lambda mark: self.embed(x) + mark, mark, use_reentrant=True)
            return self.logits(self.body(y))

    net = model(cls=Whole, tied=False)
    preconditioner = after_a_coefficient_step(net)
    parts = batch(12, seed=2).split(6)
    first, second = (losses(net, part).mean() for part in parts)
    first.backward()
    second.backward()
    assert ON_TOP_OF_ANOTHER in reasons(preconditioner)


def test_micro_batches_add_up() -> None:
    net = model()
    w = kept(after_a_coefficient_step(net))
    expected = []
    for part in batch(12, seed=2).split(6):
        losses(net, part).mean().backward()
        expected.append(weighted(net, part, w)[TABLE])
    check(gradients(net), {TABLE: expected[0] + expected[1]}, TABLE)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("sharing", ["last", "ranked"])
def test_a_compiled_model_has_the_same_gradients(sharing: str) -> None:
    class InPlace(LanguageModel):
        def embed(self, x: Tensor) -> Tensor:
            y = self.tokens(x)
            y += self.positions(torch.arange(LENGTH))
            return y

    found = []
    for compiles in (False, True):
        net = model(cls=InPlace)
        preconditioner = attach(net, sharing, coefficient_steps=2)
        called = torch.compile(net, backend="aot_eager", fullgraph=True) if compiles else net
        for seed in (1, 2, 3):
            net.zero_grad()
            losses(called, batch(6, seed)).mean().backward()
            preconditioner.step()
        found.append(gradients(net))
        assert TABLE in preconditioner.coverage().weighed
    check(found[1], found[0], TABLE, *PLAIN)


# State and report ---------------------------------------------------------------------------------------------


def train(net: nn.Module, optimizer: FNGD, seeds: range) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        losses(net, batch(6, seed)).mean().backward()
        optimizer.step()


def test_an_interrupted_run_goes_on_as_it_would_have() -> None:
    def make() -> tuple[nn.Module, FNGD]:
        net = model()
        return net, FNGD(net, coefficient_steps=3, refresh=2)

    whole, optimizer = make()
    train(whole, optimizer, range(9))
    first, optimizer = make()
    train(first, optimizer, range(4))
    second, resumed = make()
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.coverage() == optimizer.coverage()
    train(second, resumed, range(4, 9))
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name


def test_a_state_of_another_rest_is_refused_and_one_of_before_is_taken() -> None:
    net = model()
    optimizer = FNGD(net)
    train(net, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"the checkpoint weighs the samples of tokens, positions, head, this .* none"):
        FNGD(model(), weigh_rest=False).load_state_dict(state)
    del state["param_groups"][0]["fngd"]["engine"]["rest"]
    FNGD(model()).load_state_dict(state)


def test_the_report_names_what_is_weighed() -> None:
    net = model()
    preconditioner = attach(net)
    assert preconditioner.coverage().weighed == ("tokens.weight", "positions.weight", "head.weight")
    losses(net, batch(6)).mean().backward()
    preconditioner.step()
    report = preconditioner.coverage()
    assert report.weighed == ("tokens.weight", "head.weight")
    assert report.plain["positions.weight"] == A_TABLE
    assert not set(report.plain) & set(report.weighed)
    assert str(report).splitlines()[0] == (
        "FNGD preconditions 2 parameters, and weighs the samples in tokens.weight, head.weight."
    )
