"""Micro-batches in training loops that are not the usual one."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_fngd import FNGD
from tests.nets import Net, data, net, settings_of


SHARINGS = pytest.mark.parametrize("sharing", ["never", "clipped"])


@SHARINGS
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_the_whole_model(reentrant: bool, sharing: str) -> None:
    models = net(), net()
    optimizers = [FNGD(model, lr=1e-2, **settings_of(sharing, damping=0.01)) for model in models]
    for step in range(4):
        x, y = data(6, 4, seed=step)
        x.requires_grad_()  # reentrant checkpointing asks for it
        losses = [F.cross_entropy(models[0](part), y) for part in (x, x + 1)]
        sum(losses).backward()
        losses = [F.cross_entropy(checkpoint(models[1], part, use_reentrant=reentrant), y) for part in (x, x + 1)]
        sum(losses).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert not optimizers[1].coverage().missed
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q)


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(lambda z: torch.tanh(self.norm(self.fc1(z))), x, use_reentrant=False)
        return self.fc2(hidden).flatten(1, -2).mean(1)


@SHARINGS
def test_checkpointing_with_two_forward_passes_before_a_backward_pass(sharing: str) -> None:
    models = net(), Checkpointed().double()
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        optimizer = FNGD(model, sharing=sharing)
        sum(F.cross_entropy(model(x), y) for x, y in (data(6, 4), data(6, 4, seed=2))).backward()
        optimizer.preconditioner.step()
    assert not optimizer.coverage().missed
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def rows(optimizer: FNGD) -> int:
    """How many micro-batches' sample weights are stored."""
    return len(optimizer.preconditioner.state_dict()["policy"]["rows"])


def test_replay_tells_micro_batches_apart_that_share_a_backward_pass() -> None:
    """Coefficient steps and shared ones equal those with a backward pass for each."""
    found = []
    for together in (True, False):
        model = net()
        optimizer = FNGD(model, sharing="replay", lr=1e-2, damping=0.01, coefficient_steps=2)
        for step in range(6):
            batches = [data(6, 4, seed=10 * step + part) for part in range(2)]
            if together:
                sum(F.cross_entropy(model(x), y) for x, y in batches).backward()
            else:
                for x, y in batches:
                    F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert rows(optimizer) == 4
        found.append(list(model.parameters()))
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q)


def test_accumulation_outside_of_the_parameters_keeps_the_last_micro_batch() -> None:
    """A limit, which `Window.make_room` states."""
    model = net()
    optimizer = FNGD(model, sharing="replay")
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(F.cross_entropy(model(x), y), parameters) for x, y in (data(6, 4), data(5, 4))]
    for p, *parts in zip(parameters, *gradients, strict=True):
        p.grad = sum(parts)
    optimizer.step()
    assert rows(optimizer) == 1


@pytest.mark.parametrize(("to_none", "recorded"), [(True, 1), (False, 2)])
def test_a_step_that_was_left_out_is_seen_where_gradients_are_set_to_none(to_none: bool, recorded: int) -> None:
    """As a loss scaler leaves one out. Zeroed in place, they hide it: a limit, which `Window.make_room` states."""
    model = net()
    optimizer = FNGD(model, sharing="replay")
    x, y = data(6, 4)
    F.cross_entropy(model(x), y).backward()
    optimizer.zero_grad(set_to_none=to_none)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert rows(optimizer) == recorded
