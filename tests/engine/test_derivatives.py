"""Second derivatives, and tools that take a model apart."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hf_fngd
from hf_fngd import FNGDPreconditioner
from hf_fngd.layers.base import layer_type_names


class Critic(nn.Module):
    """Every layer type but tables, whose parameters are none that a penalty on the input's gradient reaches alone."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.transposed = nn.Conv2d(1, 3, 3, padding=1), nn.ConvTranspose2d(3, 3, 3, padding=1)
        self.layer_norm, self.rms_norm = nn.LayerNorm(48), nn.RMSNorm(48)
        self.linear, self.conv1d, self.head = nn.Linear(48, 16), Conv1D(8, 16), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.transposed(torch.tanh(self.convolution(x))).flatten(1)
        h = torch.tanh(self.linear(self.rms_norm(self.layer_norm(h))))
        return self.head(torch.tanh(self.conv1d(h)))


def gradient_penalty(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Of WGAN-GP (Gulrajani et al. 2017)."""
    x = x.clone().requires_grad_()
    y = model(x)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    penalty = (g.flatten(1).norm(dim=1) - 1).square().mean()
    return list(torch.autograd.grad(y.mean() + 10 * penalty, list(model.parameters())))


def r1(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The penalty of Mescheder et al. (2018), by backward()."""
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    g.square().sum().backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def hessian_vector_product(model: nn.Module, x: Tensor) -> list[Tensor]:
    parameters = list(model.parameters())
    grads = torch.autograd.grad(model(x).square().sum(), parameters, create_graph=True)
    return list(torch.autograd.grad(grads, parameters, [torch.ones_like(p) for p in parameters]))


def through_a_step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """As MAML (Finn et al. 2017): the loss after a step of gradient descent, differentiated through that step."""
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(model(x).square().mean(), list(parameters.values()), create_graph=True)
    stepped = {name: p - 0.1 * g for (name, p), g in zip(parameters.items(), grads, strict=True)}
    loss = torch.func.functional_call(model, stepped, (x,)).square().mean()
    return list(torch.autograd.grad(loss, list(parameters.values())))


CASES = (gradient_penalty, r1, hessian_vector_product, through_a_step)


@pytest.mark.parametrize("case", CASES)
def test_second_derivatives_are_those_of_the_plain_model(case: Callable[[nn.Module, Tensor], list[Tensor]]) -> None:
    torch.manual_seed(0)
    plain, x = Critic().double(), torch.randn(6, 1, 4, 4, dtype=torch.float64)
    model = copy.deepcopy(plain)
    _kept = FNGDPreconditioner(model, sharing="uniform", layer_types=list(layer_type_names()))
    for found, expected in zip(case(model, x), case(plain, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_each_pass_weighs_and_sample_weights_are_constants() -> None:
    """Of ``p = sum_n w_n 2 y_n x_n`` the derivative by W is ``sum_n v_n w_n 2 x_n^2``, with v those of its own pass."""
    x = torch.tensor([[1.0], [2.0], [10.0]], dtype=torch.float64)
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).double()
    _kept = FNGDPreconditioner(model)
    (g,) = torch.autograd.grad(model(x).square().sum(), model[0].weight, create_graph=True)
    each = (2 * model(x) * x).flatten().detach()
    torch.testing.assert_close(g.flatten(), (clipped(each) * each).sum()[None])
    (second,) = torch.autograd.grad(g.sum(), model[0].weight)
    each = clipped(each) * 2 * x.flatten().square()
    torch.testing.assert_close(second.flatten(), (clipped(each) * each).sum()[None])


@pytest.mark.parametrize("case", [gradient_penalty, r1, None])
def test_the_report_names_what_a_penalty_leaves_plain(case: Callable[[nn.Module, Tensor], list[Tensor]] | None) -> None:
    model = Critic()
    preconditioner = FNGDPreconditioner(model, strict=True)
    for step in range(3):
        x = torch.randn(5, 1, 4, 4)
        model(x).mean().backward()
        if case is not None and step:
            case(model, x)
        preconditioner.step()
        model.zero_grad()
        note = preconditioner.coverage().note
        assert ("(create_graph=True, as for a gradient penalty) is plain (" in note) == (case is not None and step > 0)
    assert ("linear.weight" in note) == (case is not None)


def clipped(each: Tensor) -> Tensor:
    return (each.abs().mean() / each.abs()).clamp(max=1)


def tanh_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))


TOOLS: dict[str, Callable[[nn.Module], object]] = {
    "torch.func": lambda model: torch.func.grad(
        lambda p: torch.func.functional_call(model, p, (torch.ones(3, 4),)).sum()
    )(dict(model.named_parameters())),
    "torch.jit.script": torch.jit.script,
    "torch.fx": torch.fx.symbolic_trace,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_that_takes_the_model_apart_gets_an_error_with_the_way_out(tool: str) -> None:
    model = tanh_net()
    _kept = FNGDPreconditioner(model)
    with pytest.raises(RuntimeError, match=rf"{tool}.* FNGD is attached to: give it copy.deepcopy\(model\)"):
        TOOLS[tool](model)
    TOOLS[tool](copy.deepcopy(model))
    hf_fngd.detach(model)
    TOOLS[tool](model)
