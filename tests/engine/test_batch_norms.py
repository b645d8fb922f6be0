"""Under "clipped" a layer before a BatchNorm does not clip: one behind the BatchNorms does so for it."""

import copy
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from hf_fngd import FNGD, FNGDPreconditioner
from hf_fngd.engine.reasons import CLIPPED_BEHIND, COUPLED
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


def clipping(layer: nn.Linear) -> None:
    """Clip the samples at a linear layer's output, for itself and for everything before it."""
    size = 0.0 if layer.bias is None else 1.0

    def forward_hook(_: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        of_x = torch.hypot(args[0].detach().norm(dim=1), torch.tensor(size, dtype=y.dtype))

        def clipped(g: Tensor) -> Tensor:
            norms = of_x * g.norm(dim=1)
            assert norms.max() > 1.5 * norms.mean()
            return g * (norms.mean() / norms).clamp(max=1)[:, None]

        y.register_hook(clipped)

    layer.register_forward_hook(forward_hook)


def loss(y: Tensor) -> Tensor:
    """The first sample counts 20 times."""
    of_samples = y.square().sum(dim=1)
    return of_samples.sum() + 19 * of_samples[0]


def steps(
    model: nn.Module, called: nn.Module, preconditioner: FNGDPreconditioner, behind: Sequence[str] = ()
) -> set[str]:
    """Three of them; returns the names whose gradients were those of a plain model in each.

    The plain model clips at the layers ``behind``.
    """
    plain, names = copy.deepcopy(model), {name for name, _ in model.named_parameters()}
    for name in behind:
        clipping(plain.get_submodule(name))
    for seed in range(3):
        for one, own in ((model, called), (plain, plain)):
            one.zero_grad()
            loss(own(images(seed))).backward()
        preconditioner.step()
        for name, p in plain.named_parameters():
            if p.requires_grad and not torch.allclose(model.get_parameter(name).grad, p.grad, rtol=1e-9):
                names.discard(name)
    return names


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


def test_with_strict_that_is_an_error() -> None:
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


class Skipping(nn.Sequential):
    """Runs its last two layers alone in the first pass."""

    skips = True

    def forward(self, x: Tensor) -> Tensor:
        skips, self.skips = self.skips, False
        if skips:
            return nn.functional.linear(x.flatten(1)[:, :8], self[-1].weight, self[-1].bias)
        return super().forward(x)


class Reentrant(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(super().forward, x.requires_grad_(), use_reentrant=True)
        return y


@pytest.mark.parametrize("cls", [Reentrant, Skipping, nn.Sequential])
def test_batch_norms_that_the_graph_does_not_show_are_told(
    cls: type[nn.Sequential], caplog: pytest.LogCaptureFixture
) -> None:
    model, hidden = network(cls), cls is not nn.Sequential
    optimizer = FNGD(model)
    loss(model(images())).backward()
    assert any(record.levelname == "WARNING" for record in caplog.records) == hidden
    optimizer.step()
    assert ("does not show the BatchNorms 1, 8:" in optimizer.coverage().note) == hidden


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_block_with_or_before_a_batch_norm_is_plain(whole: bool) -> None:
    torch.manual_seed(0)
    body = network()[:2] if whole else network()[:1]
    rest = [] if whole else [nn.BatchNorm2d(8)]
    model = nn.Sequential(body, *rest, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2)).double()
    copied = copy.deepcopy(model)
    optimizer = FNGDPreconditioner(model, strict=True)
    body.compile(backend="aot_eager")
    clipping(copied[-1])
    for seed in range(3):
        for one in (model, copied):
            one.zero_grad()
            loss(one(images(seed))).backward()
        optimizer.step()
        for p, q in zip(model.parameters(), copied.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=0)
    assert optimizer.coverage().plain["0.0.weight"] == CLIPPED_BEHIND


def test_batch_norms_that_are_frozen_or_in_evaluation_mode_are_not_missed() -> None:
    model = network(Reentrant)
    model[1].requires_grad_(False)
    model[8].eval()
    optimizer = FNGD(model)
    loss(model(images())).backward()
    assert "BatchNorms" not in optimizer.coverage().note
