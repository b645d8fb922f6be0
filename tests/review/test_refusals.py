"""What cannot work is refused in clear words, and what can is not."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from hf_fngd import FNGD, FNGDPreconditioner
from tests.nets import data, loss, net


@pytest.mark.parametrize("build", [FNGD, FNGDPreconditioner])
@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, pickle.dumps])
def test_copies(build: Callable[[nn.Module], Any], clone: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="belongs to one model"):
        clone(build(net()))


def test_a_sparse_gradient() -> None:
    model = nn.Sequential(nn.Embedding(10, 5, sparse=True), nn.Linear(5, 3))
    optimizer = FNGD(model)
    model(torch.arange(8).view(4, 2)).sum().backward()
    with pytest.raises(RuntimeError, match="no sparse gradients"):
        optimizer.step()


def test_a_weight_that_was_pruned_before_is_plain_and_reported() -> None:
    model = net()
    prune.l1_unstructured(model.fc1, "weight", amount=0.5)
    optimizer = FNGD(model)
    loss(model, *data(6, 4)).backward()
    optimizer.step()
    assert "computed from other parameters" in optimizer.coverage().plain["fc1.weight_orig"]
    assert set(optimizer.coverage().preconditioned) == {"fc2.weight", "fc2.bias"}


def test_a_weight_that_is_pruned_meanwhile_stays_preconditioned() -> None:
    model = net()
    optimizer = FNGD(model, sharing="replay")
    for layer in (model.fc1, model.fc2):
        prune.l1_unstructured(layer, "weight", amount=0.5)
    for seed in (1, 2):
        loss(model, *data(6, 4, seed=seed)).backward()
    optimizer.step()
    assert optimizer.preconditioner.policy.recorded == 2
    assert not optimizer.coverage().missed
