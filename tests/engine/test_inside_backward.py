"""Optimizers that step inside backward, one hook a parameter, with the engine in front of them."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from hf_fngd import FNGDPreconditioner
from tests.nets import Checkpointed, Net, data, loss, net, settings_of
from tests.steps import assert_equal, digest

EPOCH, STEPS = 3, 7


def inside(model: nn.Module) -> dict[nn.Parameter, torch.optim.Optimizer]:
    """An optimizer for each parameter, which steps as soon as the gradient is there."""
    optimizers = {p: torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in model.parameters()}

    def step(p: nn.Parameter) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(step)
    return optimizers


def train(model: nn.Module, preconditioner: FNGDPreconditioner, after: Callable[[], None]) -> None:
    for step in range(STEPS):
        loss(model, *data(6, 3, seed=step)).backward()
        after()
        if step == EPOCH - 1:
            preconditioner.end_epoch()


def reference(sharing: str, cls: type[Net] = Net) -> tuple[nn.Module, FNGDPreconditioner]:
    """The same by one optimizer after backward."""
    model = net(cls=cls)
    preconditioner = FNGDPreconditioner(model, **settings_of(sharing, damping=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    preconditioner.follow(optimizer)
    train(model, preconditioner, lambda: (optimizer.step(), optimizer.zero_grad())[1])
    return model, preconditioner


@pytest.mark.parametrize("sharing", ["clipped", "replay", "never"])
@pytest.mark.parametrize("way", ["all", "the first to step", "dummy", "by hand"])
def test_it_is_right_when_the_step_is_closed_with_the_pass(sharing: str, way: str) -> None:
    model = net()
    preconditioner = FNGDPreconditioner(model, **settings_of(sharing, damping=0.1))
    optimizers = inside(model)
    dummy: Any = LayerWiseDummyOptimizer(optimizers)
    if way == "all":
        for optimizer in optimizers.values():
            preconditioner.follow(optimizer)
    elif way == "the first to step":  # before backward reaches any layer that is weighed
        preconditioner.follow(optimizers[model.fc2.bias])
    elif way == "dummy":
        preconditioner.follow(dummy)
    after = {"dummy": dummy.step, "by hand": preconditioner.step}.get(way, lambda: None)
    train(model, preconditioner, after)
    expected, other = reference(sharing)
    assert_equal(model, expected)
    assert digest(preconditioner.state_dict()) == digest(other.state_dict())
    if sharing == "replay":
        assert preconditioner.policy.shared_since == EPOCH


class Plain(Net):
    """Its last parameter is no layer's: backward reaches it before any layer that is weighed."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scale = nn.Parameter(torch.ones(4))

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().head(hidden) * self.scale


def test_a_plain_parameter_may_step_before_any_layer_is_reached() -> None:
    model = net(cls=Plain)
    preconditioner = FNGDPreconditioner(model, **settings_of("replay", damping=0.1))
    preconditioner.follow(inside(model)[model.scale])
    train(model, preconditioner, lambda: None)
    assert preconditioner.policy.steps == STEPS
    assert_equal(model, reference("replay", Plain)[0])


def test_checkpointed_layers_and_a_pass_that_breaks_off() -> None:
    model = net(cls=Checkpointed)
    preconditioner = FNGDPreconditioner(model, **settings_of("replay", damping=0.1))
    optimizers = inside(model)
    for optimizer in optimizers.values():
        preconditioner.follow(optimizer)

    def fail(gradient: torch.Tensor) -> None:
        raise MemoryError

    handle = model.fc1.bias.register_hook(fail)
    with pytest.raises(MemoryError):
        loss(model, *data(6, 3, seed=100)).backward()
    handle.remove()
    model.load_state_dict(net(cls=Checkpointed).state_dict())
    for optimizer in optimizers.values():
        optimizer.state.clear()
    model.zero_grad()
    train(model, preconditioner, lambda: None)
    assert preconditioner.policy.steps == STEPS
    assert_equal(model, reference("replay", Checkpointed)[0])


class Reentrant(Checkpointed):
    reentrant = True


def test_within_reentrant_checkpointing_it_is_refused_and_the_cure_is_right() -> None:
    def train_with_gradients_of_inputs(model: nn.Module, after: Callable[[], Any]) -> None:
        for step in range(4):
            x, y = data(6, 3, seed=step)
            loss(model, x.requires_grad_(), y).backward()
            after()

    model = net(cls=Reentrant)
    preconditioner = FNGDPreconditioner(model, **settings_of("replay", damping=0.1))
    for optimizer in inside(model).values():
        preconditioner.follow(optimizer)
    with pytest.raises(
        RuntimeError, match=r"reentrant checkpointing .*use_reentrant=False, or .*preconditioner.step\(\)"
    ):
        train_with_gradients_of_inputs(model, lambda: None)
    cured, expected = net(cls=Reentrant), net(cls=Reentrant)
    settings = settings_of("replay", damping=0.1, coefficient_steps=2)
    preconditioner, other = FNGDPreconditioner(cured, **settings), FNGDPreconditioner(expected, **settings)
    inside(cured)
    train_with_gradients_of_inputs(cured, preconditioner.step)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    other.follow(optimizer)
    train_with_gradients_of_inputs(expected, lambda: (optimizer.step(), optimizer.zero_grad()))
    assert_equal(cured, expected)
    assert digest(preconditioner.state_dict()) == digest(other.state_dict())


def test_what_is_never_closed_is_told_once_with_the_cure(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    preconditioner = FNGDPreconditioner(model, sharing="replay")
    inside(model)
    with caplog.at_level(logging.WARNING):
        train(model, preconditioner, lambda: None)
    told = [record.getMessage() for record in caplog.records if "step was not called" in record.getMessage()]
    assert len(told) == 1
    assert "preconditioner.follow(optimizer)" in told[0]
    assert "preconditioner.step() after each backward pass" in told[0]
