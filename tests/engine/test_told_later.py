"""What the report tells later, of layers that were weighed before, and of a gradient that is weighed in part."""

import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fngd import FNGD, FNGDPreconditioner
from hf_fngd.engine.reasons import CALLED_AGAIN, NEVER_CALLED, OTHER_INPUT, PASSED_BY
from tests.nets import CLASSES, LAYER_NAMES, Net, data, loss, net
from tests.steps import gradient, one_step, with_engine

# What goes wrong later -------------------------------------------------------------------------------------


class Headed(Net):
    """Its second layer is used in some batches only, or functionally; or its first one twice."""

    use = "call"

    def hidden(self, x: Tensor) -> Tensor:
        hidden = super().hidden(x)
        return hidden + self.fc1(x).sum() if self.use == "twice" else hidden

    def head(self, hidden: Tensor) -> Tensor:
        if self.use in ("call", "twice"):
            return self.fc2(hidden).mean(1)
        if self.use == "functional":
            return F.linear(hidden, self.fc2.weight, self.fc2.bias).mean(1)
        return hidden[..., :CLASSES].mean(1)


def in_evaluation_mode(model: Headed) -> None:
    model.eval()


def functionally(model: Headed) -> None:
    model.use = "functional"


def patched(model: Headed) -> None:
    """In a way that the model does not notice."""
    plain = type(model).__mro__[1].forward
    vars(model)["forward"] = lambda *args: plain(model, *args)


def without_the_model(model: Headed) -> None:
    vars(model)["forward"] = lambda x: model.head(torch.tanh(model.fc1(x)))


def twice(model: Headed) -> None:
    model.use = "twice"


WAYS = {in_evaluation_mode: LAYER_NAMES, patched: LAYER_NAMES, without_the_model: LAYER_NAMES, functionally: ("fc2",)}
LATER = [(change, sharing, PASSED_BY, layers) for change, layers in WAYS.items() for sharing in ("clipped", "never")]
LATER += [(twice, "never", CALLED_AGAIN, ("fc1",))]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("change", "sharing", "reason", "layers"), LATER, ids=[f"{c.__name__}-{s}" for c, s, *_ in LATER]
)
def test_what_goes_wrong_later_is_told_then_and_once(
    change: Callable[[Headed], None],
    sharing: str,
    reason: str,
    layers: tuple[str, ...],
    strict: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (model, preconditioner), (x, y) = with_engine(net(cls=Headed), sharing=sharing, strict=strict), data(7, 3)
    for step in range(4):
        if step == 2:
            assert not caplog.records
            assert preconditioner.coverage().missed == {}
            change(model)
        model.zero_grad()
        loss(model, x, y).backward()
        if strict and step == 2:
            with pytest.raises(RuntimeError, match=f"(?s)strict=True: .*{reason}"):
                preconditioner.step()
            return
        preconditioner.step()
    (record,) = caplog.records
    assert reason in record.getMessage()
    assert [name for name in LAYER_NAMES if name in record.getMessage()] == list(layers)
    missed = dict.fromkeys((f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")), reason)
    assert preconditioner.coverage().missed == missed


@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("first", ["call", "unused"])
def test_a_head_that_a_batch_does_not_use_is_not_missed(
    first: str, set_to_none: bool, caplog: pytest.LogCaptureFixture
) -> None:
    (model, preconditioner), (x, y) = with_engine(net(cls=Headed), strict=True), data(7, 3)
    for step, model.use in enumerate((first, "unused", "call", "unused", "unused")):
        model.zero_grad(set_to_none=set_to_none)
        loss(model, x, y).backward()
        preconditioner.step()
        never = step < 2 and first == "unused"  # so far
        assert set(preconditioner.coverage().missed.values()) == ({NEVER_CALLED} if never else set())
    assert preconditioner.coverage().missed == {}
    assert not caplog.records


# What is told of a gradient that is weighed in part --------------------------------------------------------


def in_evaluation(model: Net, x: Tensor) -> Tensor:
    model.eval()
    output: Tensor = model(x)
    model.train()
    return output


def part_in_training(model: Net, x: Tensor) -> Tensor:
    """The model is in evaluation mode, its layers are not."""
    model.training = False
    output: Tensor = model(x)
    model.training = True
    return output


def layers_alone(model: Net, x: Tensor) -> Tensor:
    return model.head(model.fc1(x))


@pytest.mark.parametrize("beside", [in_evaluation, part_in_training, layers_alone])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_part_of_a_gradient_that_is_not_weighed_is_told(
    beside: Callable[[Net, Tensor], Tensor], accumulated: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever comes first, the model's own forward pass or the other."""
    (model, preconditioner), (x, y) = with_engine(net()), data(7, 3)
    others = torch.zeros(7, CLASSES, dtype=x.dtype)
    for step in range(3):
        model.zero_grad()
        for _ in range(accumulated):
            if step == 2:
                others = beside(model, x.flip(0))
            (loss(model, x, y) + F.cross_entropy(others, y)).backward()
        if step == 1:
            preconditioner.step()
            assert preconditioner.coverage().missed == {}
            assert not caplog.records
    preconditioner.step()
    assert set(preconditioner.coverage().missed.values()) == {PASSED_BY}
    assert {"fc1.weight", "fc2.weight"} <= preconditioner.coverage().missed.keys()
    (record,) = caplog.records
    assert PASSED_BY in record.getMessage()


def test_what_gives_a_weight_no_gradient_is_not_told() -> None:
    """An adversarial example, a penalty of the output alone, and an evaluation that nobody differentiates."""
    (model, preconditioner), (x, y) = with_engine(net()), data(7, 3)
    for _ in range(2):
        model.zero_grad()
        x.requires_grad_()
        (towards,) = torch.autograd.grad(F.cross_entropy(in_evaluation(model, x), y), x)
        x = (x + 0.1 * towards.sign()).detach()
        in_evaluation(model, x)
        in_evaluation(model, x.requires_grad_()).sum().backward(inputs=[x])
        one_step(model, preconditioner, x.detach(), y)
    assert preconditioner.coverage().missed == {}


# Why a layer is not weighed --------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", ["clipped", "never"])
def test_a_layer_in_evaluation_mode_is_weighed_in_the_models_training_pass(sharing: str) -> None:
    found = []
    for evaluates in (False, True):
        (model, preconditioner), (x, y) = with_engine(net(), sharing=sharing, strict=True), data(7, 3)
        model.fc1.train(not evaluates)
        one_step(model, preconditioner, x, y)
        assert "fc1.weight" in preconditioner.coverage().preconditioned
        found.append(gradient(model))
    assert torch.equal(*found)


def test_an_input_without_a_batch_is_told() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1))
    preconditioner = FNGDPreconditioner(model)
    model(torch.ones(5)).sum().backward()
    preconditioner.step()
    assert set(preconditioner.coverage().missed.values()) == {OTHER_INPUT}


def test_the_report_names_what_is_taken_for_an_output_head() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(5, 3), "out": nn.Linear(3, 1)})
    vars(model)["forward"] = lambda x: model["out"](model["fc"](x))
    assert "The fallback rule steps fc.weight, fc.bias, as an output head" in str(FNGD(model).coverage())


def test_an_optimizer_that_is_refused_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1))
    with pytest.raises(ValueError, match="means no parameter of the model"):
        FNGD(model, param_groups=[{"params": ["nothing"]}])
    gc.collect()
    assert not caplog.records
    assert type(model[0]) is nn.Linear
