"""Under "clipped" a layer before a BatchNorm does not clip."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

from hf_fngd import FNGD, FNGDPreconditioner
from hf_fngd.engine.reasons import CLIPPED_BEHIND
from tests.engine.batch_norms import PLAIN, images, network, steps
from tests.nets import settings_of


class Checkpointed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint_sequential(list(self), 3, x, use_reentrant=False)
        return y


@pytest.mark.parametrize("cls", [nn.Sequential, Checkpointed])
def test_a_layer_before_a_batch_norm_is_plain_and_reported(cls: type[nn.Sequential]) -> None:
    model = network(cls)
    preconditioner = FNGDPreconditioner(model, strict=True)
    plain = steps(model, model, preconditioner, ["10"])
    assert plain == {name for name, _ in model.named_parameters()} - {"3.weight", "3.bias"}
    report = preconditioner.coverage()
    assert {name for name, reason in report.plain.items() if reason == CLIPPED_BEHIND} == PLAIN
    assert {"3.weight", "3.bias", "10.weight"} <= set(report.preconditioned) | set(report.weighed)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_in_a_compiled_model_too() -> None:
    model = network()
    preconditioner = FNGDPreconditioner(model)
    plain = steps(model, torch.compile(model, backend="aot_eager", fullgraph=True), preconditioner, ["10"])
    assert plain == {name for name, _ in model.named_parameters()} - {"3.weight", "3.bias"}
    report = preconditioner.coverage()
    assert {name for name, reason in report.plain.items() if reason == CLIPPED_BEHIND} == PLAIN


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
    assert steps(model, model, FNGDPreconditioner(model), ["5"]) == {name for name, _ in model.named_parameters()}


class Residual(nn.Module):
    """Pre-activation: each BatchNorm reads the sum, or the channels, of all outputs so far."""

    def __init__(self, cat: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cat, more = cat, 4 if cat else 0
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.inner, self.conv = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.last, self.head = nn.BatchNorm2d(4 + more), nn.Linear(4 + more, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv(torch.tanh(self.inner(torch.relu(self.norm(x)))))
        y = torch.cat([x, y], dim=1) if self.cat else x + y
        out: Tensor = self.head(torch.relu(self.last(y)).mean((2, 3)))
        return out


@pytest.mark.parametrize("cat", [False, True])
def test_a_batch_norm_may_read_a_sum_or_several_outputs(cat: bool) -> None:
    model = Residual(cat).double()
    preconditioner = FNGDPreconditioner(model, strict=True)
    plain = steps(model, model, preconditioner, ["head"])
    assert plain == {name for name, _ in model.named_parameters()} - {"inner.weight", "inner.bias"}


@pytest.mark.parametrize("left_out", [{"target_modules": ["10"]}, {"exclude_modules": ["0", "7"]}])
def test_where_no_layer_before_one_is_attached_nothing_is_scaled(left_out: dict[str, list[str]]) -> None:
    model = network()
    model[3], model[4] = nn.Conv2d(8, 8, 3, bias=False).double(), nn.BatchNorm2d(8).double()
    left_out = {name: [*value, "3"] if name == "exclude_modules" else value for name, value in left_out.items()}
    plain = steps(model, model, FNGDPreconditioner(model, **left_out))
    assert plain == {name for name, _ in model.named_parameters()} - {"10.weight", "10.bias"}


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: nn.functional.max_pool2d(x, 2),
        lambda x: x[:, :, 1:],
        torch.relu,
    ],
    ids=["copied", "pooled", "cut", "activated"],
)
def test_what_is_between_a_layer_and_a_batch_norm_does_not_count(between: Callable[[Tensor], Tensor]) -> None:
    class Between(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return between(x)

    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), Between(), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(8, 2)),
    ).double()
    plain = steps(model, model, FNGDPreconditioner(model, strict=True), ["6"])
    assert plain == {name for name, _ in model.named_parameters()}


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
    assert optimizer.coverage().plain["0.weight"] == f"{CLIPPED_BEHIND}, and the update rule steps it"
    assert optimizer.param_groups[0]["rule"] == "block_muon"
    assert "0.weight" in optimizer.param_groups[0]["param_names"]
    assert not torch.equal(model[0].weight, network()[0].weight)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
