"""Under "clipped" a layer is plain whose output a BatchNorm reads: there the samples' gradients cancel each other."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

from hf_fngd import FNGD, FNGDPreconditioner
from hf_fngd.engine.reasons import COUPLED
from tests.nets import settings_of

PLAIN = {"0.weight", "7.weight", "7.bias"}


class Checkpointed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint_sequential(list(self), 3, x, use_reentrant=False)
        return y


def network(cls: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
    """Two convolutions and two linear layers; a BatchNorm reads the first of each."""
    torch.manual_seed(0)
    return cls(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(8 * 16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)),
    ).double()


def images(seed: int = 0) -> Tensor:
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[0] *= 10
    return x


def steps(model: nn.Module, called: nn.Module, preconditioner: FNGDPreconditioner) -> set[str]:
    """Three of them; returns the names whose gradients were those of the plain model in each."""
    plain, names = copy.deepcopy(model), {name for name, _ in model.named_parameters()}
    for seed in range(3):
        for one, own in ((model, called), (plain, plain)):
            one.zero_grad()
            own(images(seed)).square().sum().backward()
        preconditioner.step()
        for name, p in plain.named_parameters():
            if not torch.allclose(model.get_parameter(name).grad, p.grad, rtol=1e-9):
                names.discard(name)
    return names


@pytest.mark.parametrize("cls", [nn.Sequential, Checkpointed])
def test_a_layer_before_a_batch_norm_is_plain_and_reported(cls: type[nn.Sequential]) -> None:
    model = network(cls)
    preconditioner = FNGDPreconditioner(model)
    plain = steps(model, model, preconditioner)
    assert plain >= PLAIN
    assert not plain & {"3.weight", "10.weight"}
    report = preconditioner.coverage()
    assert {name for name, reason in report.missed.items() if reason == COUPLED} == PLAIN
    assert {"3.weight", "3.bias", "10.weight"} <= set(report.preconditioned) | set(report.weighed)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_in_a_compiled_model_too() -> None:
    model = network()
    preconditioner = FNGDPreconditioner(model)
    plain = steps(model, torch.compile(model, backend="aot_eager", fullgraph=True), preconditioner)
    assert plain >= PLAIN
    assert not plain & {"3.weight", "10.weight"}
    assert {name for name, reason in preconditioner.coverage().missed.items() if reason == COUPLED} == PLAIN


def test_before_one_in_evaluation_mode_it_is_weighed() -> None:
    model = network()
    for module in (model[1], model[8]):
        module.eval()
    preconditioner = FNGDPreconditioner(model, strict=True)
    assert not steps(model, model, preconditioner) & PLAIN


def test_before_an_instance_norm_it_is_weighed() -> None:
    model = network()
    model[1], model[8] = nn.InstanceNorm2d(8).double(), nn.Identity()
    preconditioner = FNGDPreconditioner(model, strict=True)
    assert not steps(model, model, preconditioner) & PLAIN


def test_layers_that_share_their_weight_are_plain_in_all_uses_from_the_first_step_on() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU()),
        *(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(3 * 64, 2)),
    ).double()
    model[3].weight = model[0].weight
    assert "0.weight" in steps(model, model, FNGDPreconditioner(model))


@pytest.mark.parametrize("sharing", ["never", "replay"])
def test_the_papers_sample_weights_are_for_all_layers(sharing: str) -> None:
    model = network()
    preconditioner = FNGDPreconditioner(model, strict=True, **settings_of(sharing))
    assert not steps(model, model, preconditioner) & PLAIN


def test_the_update_rule_moves_it_all_the_same_and_a_resumed_run_goes_on() -> None:
    model = network()
    optimizer = FNGD(model, lr=1e-2)
    other = network()
    resumed = FNGD(other, lr=1e-2)
    for seed in range(4):
        if seed == 2:
            other.load_state_dict(model.state_dict())
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for one, own in ((model, optimizer), (other, resumed)):
            if one is model or seed >= 2:
                own.zero_grad()
                one(images(seed)).square().sum().backward()
                own.step()
    assert optimizer.param_groups[0]["rule"] == "block_muon"
    assert "0.weight" in optimizer.param_groups[0]["param_names"]
    assert not torch.equal(model[0].weight, network()[0].weight)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
