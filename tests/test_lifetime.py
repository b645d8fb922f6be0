"""How long a model stays attached: as long as its optimizer, or what follows it, and what another one is told."""

import gc
import logging

import pytest
import torch

from hf_fngd import FNGD, FNGDPreconditioner, detach, policy_names
from tests.nets import data, loss, net
from tests.steps import one_step, with_fngd


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("sharing", policy_names())
def test_without_its_optimizer_a_model_is_plain_again(sharing: str, after: int) -> None:
    model = net()
    classes = [type(module) for module in model.modules()]
    optimizer = FNGD(model, sharing=sharing)
    for seed in range(after):
        one_step(model, optimizer, *data(6, seed=seed))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    assert [type(module) for module in model.modules()] != classes
    del optimizer, scheduler
    gc.collect()
    assert [type(module) for module in model.modules()] == classes
    FNGD(model)


def test_an_engine_lives_as_long_as_the_optimizer_that_it_follows() -> None:
    model = net()
    plain = type(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    FNGDPreconditioner(model).follow(optimizer)
    gc.collect()
    assert type(model) is not plain
    del optimizer
    gc.collect()
    assert type(model) is plain


@pytest.mark.parametrize("before", ["nothing", "detach", "a step"])
def test_an_optimizer_that_is_dropped_before_its_first_step_says_so(
    before: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = net()
    optimizer = FNGD(model)
    if before == "detach":
        detach(model)
    if before == "a step":
        one_step(model, optimizer, *data(6))
    del optimizer
    gc.collect()
    assert ("was dropped before its first step" in caplog.text) == (before == "nothing")


def test_another_optimizer_on_an_attached_model_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model, fngd = with_fngd()
    other = torch.optim.SGD(model.parameters(), lr=0.1)

    def train(optimizer: torch.optim.Optimizer, steps: int, *, set_to_none: bool) -> None:
        for seed in range(steps):
            optimizer.zero_grad(set_to_none=set_to_none)
            loss(model, *data(6, seed=seed)).backward()
            optimizer.step()

    with caplog.at_level(logging.WARNING):
        train(fngd, 8, set_to_none=True)
        train(fngd, 8, set_to_none=False)
        assert not caplog.records
        train(other, 3, set_to_none=True)
        assert not caplog.records
        train(other, 8, set_to_none=False)
    (record,) = caplog.records
    assert "attached to a model that another optimizer trains. Call hf_fngd.detach(model)" in record.getMessage()
