"""Under "clipped" a layer behind the BatchNorms clips for all before them."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from hf_fngd import FNGDPreconditioner
from hf_fngd.engine.reasons import COUPLED
from tests.engine.batch_norms import PLAIN, images, loss, network, steps


class Heads(nn.Module):
    """One or two heads behind the last BatchNorm, the second behind a layer with a shortcut around it."""

    def __init__(self, cls: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), cls(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.one, self.between, self.two = nn.Linear(8, 2), nn.Linear(8, 8), nn.Linear(8, 2, bias=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x).flatten(1)
        return {"one": self.one(h), "two": self.two(h + torch.tanh(self.between(h)))}


class Sum(nn.Module):
    def __init__(self, model: Heads) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        y = self.model(x)
        return torch.cat([y["one"], 3 * y["two"]], dim=1)


def test_each_head_clips_for_what_is_before_it() -> None:
    model = Sum(Heads()).double()
    plain = steps(model, model, FNGDPreconditioner(model), ["model.one", "model.two"])
    assert plain == {name for name, _ in model.named_parameters()} - {"model.between.weight", "model.between.bias"}


def test_a_layer_behind_no_batch_norm_clips_for_itself_alone() -> None:
    model = Sum(Heads(partial(nn.GroupNorm, 2))).double()  # type: ignore[arg-type]
    report = FNGDPreconditioner(model)
    assert not steps(model, model, report, ["model.one", "model.two"]) & {"model.body.0.weight", "model.between.weight"}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gradient_that_goes_on_through_the_inputs_is_the_plain_models(compiled: bool) -> None:
    """As a generator's, through a discriminator that FNGD trains."""
    model, plain = network(), network()
    FNGDPreconditioner(model)
    called = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    loss(called(images(1))).backward()  # the first graph has been read
    loss(plain(images(1)))
    found = []
    for own in (called, plain):
        x = images(2).requires_grad_()
        loss(own(x)).backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


def test_a_branch_without_a_batch_norm_clips_layer_by_layer() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.body, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 2)
            self.aside = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
            self.other = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x))
            y: Tensor = self.head(torch.relu(self.body(x)).mean((2, 3))) + self.other(self.aside(x).mean((2, 3)))
            return y

    model = Branches().double()
    plain = steps(model, model, FNGDPreconditioner(model), ["other"])
    assert plain == {"aside.0.weight", "aside.0.bias", "aside.1.weight", "aside.1.bias", "other.weight", "other.bias"}


def test_gradients_of_some_parameters_alone_are_clipped_too() -> None:
    model = network()
    FNGDPreconditioner(model)
    loss(model(images())).backward()
    whole = model[0].weight.grad
    for _ in range(2):
        (alone,) = torch.autograd.grad(loss(model(images())), model[0].weight)
        torch.testing.assert_close(alone, whole)


def test_a_head_that_is_frozen_later_clips_no_more_and_the_report_says_so() -> None:
    model = network()
    preconditioner = FNGDPreconditioner(model)
    steps(model, model, preconditioner, ["10"])
    assert "sample weights of 10.weight also scale" in preconditioner.coverage().note
    model[10].requires_grad_(False)
    plain = steps(model, model, preconditioner)
    assert plain >= PLAIN
    assert {name for name, reason in preconditioner.coverage().missed.items() if reason == COUPLED} == PLAIN


def test_with_strict_a_head_that_is_frozen_later_is_an_error() -> None:
    model = network()
    preconditioner = FNGDPreconditioner(model, strict=True)
    steps(model, model, preconditioner, ["10"])
    model[10].requires_grad_(False)
    with pytest.raises(RuntimeError, match="strict=True"):
        steps(model, model, preconditioner)


def test_where_the_first_layer_behind_is_left_out_the_next_one_clips() -> None:
    model = network()
    model.insert(10, nn.Linear(8, 8).double())
    preconditioner = FNGDPreconditioner(model, exclude_modules=["10"])
    plain = steps(model, model, preconditioner, ["11"])
    assert plain == {name for name, _ in model.named_parameters()} - {"3.weight", "3.bias"}


def test_without_a_layer_behind_it_is_missed() -> None:
    model = network()[:9]
    preconditioner = FNGDPreconditioner(model)
    steps(model, model, preconditioner)
    assert {name for name, reason in preconditioner.coverage().missed.items() if reason == COUPLED} == PLAIN
    with pytest.raises(RuntimeError, match="strict=True"):
        steps(model, model, strict(model, preconditioner))


def strict(model: nn.Module, other: FNGDPreconditioner) -> FNGDPreconditioner:
    other.detach()
    return FNGDPreconditioner(model, strict=True)
