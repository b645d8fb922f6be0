"""Batches that are lists of dictionaries or dataclasses with slots, and inputs of which none tells the samples."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_fngd import FNGDPreconditioner
from hf_fngd.engine.reasons import NO_BATCH
from tests.nets import settings_of
from tests.reference import Clipping, uses_of

SAMPLES, LENGTH, WIDTH = 5, 4, 3


@dataclass(slots=True)
class Slotted:
    x: Tensor


@dataclass
class Sample:
    x: Tensor


class Unknown:
    def __init__(self, x: Tensor) -> None:
        self.x = x


class Reading(nn.Module):
    """Takes the batch in one of several forms, and runs its layers on all samples at once, or on all positions."""

    def __init__(self, folded: bool) -> None:
        super().__init__()
        self.folded = folded
        self.first, self.head = nn.Linear(WIDTH, 6), nn.Linear(6, 2)

    def forward(self, batch: Any) -> Tensor:
        if isinstance(batch, list):
            batch = torch.stack([one["x"] if isinstance(one, dict) else one.x for one in batch])
        x = batch if isinstance(batch, Tensor) else batch.x
        if self.folded:
            return self.head(torch.tanh(self.first(x.flatten(0, 1)))).view(len(x), -1, 2).mean(1)
        return self.head(torch.tanh(self.first(x))).mean(1)


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "a list of dictionaries": lambda x: [{"x": one} for one in x],
    "a list of dataclasses": lambda x: [Sample(one) for one in x],
    "a dataclass with slots": Slotted,
}


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_samples_are_weighed(form: str, folded: bool) -> None:
    torch.manual_seed(0)
    model = Reading(folded).double()
    plain = copy.deepcopy(model)
    x = torch.randn(SAMPLES, LENGTH, WIDTH, dtype=torch.float64)
    x[1] *= 20
    preconditioner = FNGDPreconditioner(model, strict=True, **settings_of("clipped"))
    model(FORMS[form](x)).square().sum().backward()
    preconditioner.step()

    def share(model: nn.Module, n: int) -> Tensor:
        return model(x[n : n + 1]).square().sum()

    trained = {name for name, _ in plain.named_parameters()}
    uses = [uses_of(plain, ["first", "head"], share, n, trained) for n in range(SAMPLES)]
    for name, g in Clipping().gradients(uses)[0].items():
        grad = model.get_parameter(name).grad
        assert grad is not None
        torch.testing.assert_close(grad, g.view_as(grad), rtol=1e-9, atol=1e-12, msg=name)


def test_the_report_says_where_no_input_tells_the_samples() -> None:
    model = Reading(False)
    preconditioner = FNGDPreconditioner(model)
    model(Unknown(torch.randn(SAMPLES, LENGTH, WIDTH))).square().sum().backward()
    preconditioner.step()
    assert set(preconditioner.coverage().missed.values()) == {NO_BATCH}
