"""The log has each reason why a layer is not weighed once, when it first holds."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fngd import FNGDPreconditioner
from hf_fngd.samples.rows import NOT_THE_BATCH

WIDTH = 6


class Changing(nn.Module):
    """No probe can run. Its first layer sees as many positions as samples at first, and its second no batch later."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.cut = False

    def forward(self, x: Tensor) -> Tensor:
        assert self.training
        y = self.first(x).mean(1)
        rows = self.second(y[:-1] if self.cut else y)
        return self.head(F.pad(rows, (0, 0, 0, int(self.cut))))


def test_a_layer_that_is_missed_is_told_of_though_another_no_longer_is(caplog: pytest.LogCaptureFixture) -> None:
    model = Changing()
    preconditioner = FNGDPreconditioner(model)

    def step(samples: int) -> str:
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="hf_fngd"):
            model(torch.randn(samples, 4, WIDTH)).square().sum().backward()
            preconditioner.step()
        model.zero_grad()
        return caplog.text

    assert "first.weight" in step(4)  # the second dimension is as long as the batch
    assert not step(4)
    model.cut = True
    told = step(5)
    assert NOT_THE_BATCH in told
    assert "second.weight" in told
    assert not step(5)
    model.cut = False
    assert not step(5)
