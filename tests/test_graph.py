"""Weights that are used outside of their layers' forward."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_fngd import FNGD
from tests.nets import Net, data


@dataclass
class Output:
    logits: Tensor
    features: Tensor | None = None


class Tied(Net):
    """Uses a layer's weight outside of its forward as well."""

    def forward(self, x: Tensor) -> Output:
        return Output(super().forward(x) + self.fc2.weight.sum(1))


def test_a_weight_that_is_used_elsewhere_is_found_behind_a_dataclass() -> None:
    torch.manual_seed(0)
    model = Tied().double()
    optimizer = FNGD(model)
    x, y = data(6, 4)
    F.cross_entropy(model(x).logits, y).backward()
    optimizer.step()
    assert set(optimizer.coverage().missed) == {"fc2.weight", "fc2.bias"}
