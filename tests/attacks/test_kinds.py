"""Kinds of silent fault (docs/bug_reports.md) in float32 and under bf16 autocast, eager and compiled."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_fngd import FNGD, FNGDPreconditioner
from tests.nets import data, loss, net

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    # Raised and ignored by the compiler itself.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"]),
    pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"]),
]


def prepared(model: nn.Module, compiled: bool) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, backend="aot_eager") if compiled else model


def value(called: Any, x: Tensor, y: Tensor, bf16: bool) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return loss(called, x, y)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def outlier() -> tuple[Tensor, Tensor]:
    x, y = data(6, 3)
    x = x.float()
    x[2] *= 50
    return x, y


def test_without_its_optimizer_a_model_is_plain(compiled: bool, bf16: bool) -> None:
    plain = net().float()
    model = copy.deepcopy(plain)
    called, optimizer = prepared(model, compiled), FNGD(model, lr=0.0)
    batch = outlier()
    value(called, *batch, bf16).backward()
    optimizer.step()
    weighed = gradients(model)
    del optimizer
    gc.collect()
    model.zero_grad()
    for each in (called, prepared(plain, compiled)):
        value(each, *batch, bf16).backward()
    assert not torch.allclose(weighed[0], gradients(plain)[0], rtol=0.1)
    for p, q in zip(gradients(model), gradients(plain), strict=True):
        torch.testing.assert_close(p, q)


def test_a_pass_that_asks_for_no_parameter_leaves_no_trace(compiled: bool, bf16: bool) -> None:
    found = []
    for saliency in (True, False):
        model = net().float()
        called, preconditioner = prepared(model, compiled), FNGDPreconditioner(model)
        x, y = outlier()
        x.requires_grad_()
        if saliency:
            torch.autograd.grad(100 * value(called, x, y, bf16), x)
        value(called, x, y, bf16).backward()
        preconditioner.step()
        found.append(gradients(model))
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q)


def test_unfrozen_layers_train_and_are_weighed(compiled: bool, bf16: bool) -> None:
    """As if they had been trainable from the start, but for the first step."""
    found = []
    for frozen in (True, False):
        model = net().float()
        model.fc1.requires_grad_(not frozen)
        called, preconditioner = prepared(model, compiled), FNGDPreconditioner(model)
        value(called, *outlier(), bf16).backward()
        preconditioner.step()
        model.zero_grad()
        model.fc1.requires_grad_(True)
        value(called, *outlier(), bf16).backward()
        preconditioner.step()
        assert not preconditioner.coverage().missed
        found.append(gradients(model))
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q)


def test_training_in_evaluation_mode_is_told(compiled: bool, bf16: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = net().float()
    called, optimizer = prepared(model, compiled), FNGD(model)
    for training in (True, False):
        model.train(training)
        value(called, *outlier(), bf16).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert set(optimizer.coverage().missed) == {
        f"{name}.{leaf}" for name in ("fc1", "fc2") for leaf in ("weight", "bias")
    }
    assert "could not be weighed" in caplog.text


def test_as_many_positions_as_samples_are_weighed_by_sample(compiled: bool, bf16: bool) -> None:
    """A probe tells, as ids do that say it outright."""
    found = []
    for told in (True, False):
        model = net().float()
        called = prepared(model, compiled)
        preconditioner = FNGDPreconditioner(model, strict=True)
        x, y = data(6, 6)
        x = x.float()
        x[2] *= 50
        ids = {"sample_ids": torch.arange(6)} if told else {}
        value(lambda x, ids=ids, called=called: called(x, **ids), x, y, bf16).backward()
        preconditioner.step()
        assert not preconditioner.coverage().missed
        found.append(gradients(model))
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q)
