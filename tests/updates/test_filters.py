"""Filters of convolutions as matrices: which rule steps them, and that of Muon against a slow reference."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from hf_fngd import FNGD
from hf_fngd.updates.orthogonal import block_shape
from tests.reference import run
from tests.steps import assert_equal, through_file
from tests.updates.rules import polynomial

LR, STEPS, SIZE = 0.05, 6, 2


class Flipping(nn.Conv2d):
    """No layer type takes it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(-1))


class Filters(nn.Module):
    """A filter of each kind; and a head of another, as segmentation has."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 6, 3, padding=1)
        self.whole = nn.Conv2d(6, 10, 3, 2, 1)
        self.grouped = nn.Conv2d(10, 6, (1, 3), groups=2)
        self.depthwise = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.flipping = Flipping(12, 8, 1, groups=4)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2, groups=2)
        self.line = nn.Conv1d(6, 5, 3)
        self.space = nn.Conv3d(5, 6, (1, 1, 2))
        self.classifier = nn.Conv1d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.grouped(torch.tanh(self.whole(self.image(x)))))
        y = torch.tanh(self.up(torch.tanh(self.flipping(self.depthwise(y)))))
        y = torch.tanh(self.line(y.flatten(2)))
        y = self.space(y[:, :, None, None])[:, :, 0, 0]
        return self.classifier(torch.tanh(y))


MUON = {f"{name}.weight" for name in ("image", "whole", "grouped", "flipping", "up", "line", "space")}
OWNED = ("image", "whole", "grouped", "up", "line", "space")  # whose biases go with them


def made(seed: int = 0) -> Filters:
    torch.manual_seed(seed)
    return Filters().double()


def backward(model: nn.Module, step: int) -> None:
    x = torch.randn(3, 3, 6, 10, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    (model(x) - 1).square().mean().backward()


def rules(optimizer: FNGD) -> dict[str, str]:
    return {name: group["rule"] for group in optimizer.param_groups for name in group["param_names"]}


@pytest.mark.parametrize(
    ("settings", "stepped"),
    [
        ({}, MUON),
        ({"target_modules": ["whole", "depthwise", "classifier"]}, {"whole.weight", "classifier.weight"}),
        ({"exclude_modules": ["up", "flipping"]}, MUON - {"up.weight", "flipping.weight"}),
        ({"param_groups": [{"params": ["depthwise", "classifier"], "update": "muon"}]}, MUON | {"classifier.weight"}),
    ],
)  # fmt: skip
def test_muon_steps_all_filters_but_depthwise_ones_and_heads(settings: dict[str, Any], stepped: set[str]) -> None:
    found = rules(FNGD(made(), update="muon", **settings))
    assert {name for name, rule in found.items() if rule == "muon"} == stepped


def test_other_update_rules_step_all_filters_that_are_weighed() -> None:
    optimizer = FNGD(made(), update="adam", fallback="sgd")
    assert {name for name, rule in rules(optimizer).items() if rule != "adam"} == {"flipping.weight", "flipping.bias"}


def test_convolutions_that_layer_types_leaves_out_are_plain() -> None:
    model = nn.Sequential(nn.Conv1d(6, 6, 1), Flipping(6, 6, 1), nn.Flatten(), nn.Linear(6, 6))
    optimizer = FNGD(model, layer_types=["linear"])
    assert rules(optimizer) | {"3.weight": "adam"} == dict.fromkeys(rules(optimizer), "adam")
    assert "0.weight" in optimizer.coverage().plain


def test_a_rule_for_a_depthwise_filter_alone_has_no_effect() -> None:
    with pytest.raises(ValueError, match=r"\['update'\]='muon' has no effect: none of the group's parameters is a mat"):
        FNGD(made(), param_groups=[{"params": ["depthwise"], "update": "muon"}])


def matrices(module: nn.Module) -> list[tuple[Any, tuple[int, int]]]:
    """Where each matrix is in a layer's weight, and its shape: those of the groups of channels, in their order."""
    assert isinstance(module, _ConvNd)
    rows = module.in_channels if isinstance(module, _ConvTransposeNd) else module.out_channels
    height = rows // module.groups
    return [
        (slice(group * height, (group + 1) * height), (height, module.weight[0].numel()))
        for group in range(module.groups)
    ]


def reference(update: str, plain: nn.Module) -> nn.Module:
    """Slow Muon, a matrix and a block at a time, and torch's AdamW on everything else."""
    model = copy.deepcopy(plain)
    named = dict(model.named_parameters())
    rest = [p for name, p in named.items() if name not in MUON]
    adam = torch.optim.AdamW(rest, lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    buffers = {name: torch.zeros_like(named[name]) for name in MUON}
    for step in range(STEPS):
        model.zero_grad()
        backward(model, step)
        adam.step()
        with torch.no_grad():
            for name, buffer in buffers.items():
                p = named[name]
                assert p.grad is not None
                buffer.mul_(0.9).add_(0.1 * p.grad)
                direction = 0.9 * buffer + 0.1 * p.grad
                for place, (rows, columns) in matrices(model.get_submodule(name.removesuffix(".weight"))):
                    height = rows if update == "muon" else block_shape(rows, SIZE)[1]
                    blocks = direction[place].reshape(rows, columns).split(height)
                    moved = torch.cat([polynomial(block) for block in blocks]).view_as(direction[place])
                    p[place] -= LR * 0.2 * max(height, columns) ** 0.5 * moved
    return model


def trained(update: str, model: nn.Module, steps: range = range(STEPS), optimizer: FNGD | None = None) -> FNGD:
    settings = {"block_size": SIZE} if update == "block_muon" else {}
    optimizer = optimizer or FNGD(model, lr=LR, sharing="uniform", update=update, **settings)
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("update", ["muon", "block_muon"])
def test_a_trajectory_is_that_of_a_slow_reference(update: str, layout: torch.memory_format) -> None:
    plain, model = made(), made()
    for p in model.parameters():
        if p.dim() == 4:
            p.data = p.data.contiguous(memory_format=layout)
    optimizer = trained(update, model)
    for (name, p), q in zip(model.named_parameters(), reference(update, plain).parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10, msg=name)
    report = optimizer.coverage()
    owned = {f"{name}.{leaf}" for name in OWNED for leaf in ("weight", "bias")}
    assert set(report.preconditioned) == owned
    apart = {f"{name}.{leaf}" for name in ("depthwise", "classifier") for leaf in ("weight", "bias")}
    assert set(report.weighed) == apart
    assert report.plain["flipping.weight"].endswith("a forward of its own, and the update rule steps it")


@pytest.mark.parametrize("sharing", ["never", "replay"])
def test_the_papers_steps_are_those_of_the_slow_reference(sharing: str) -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x).mean(2), y)

    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(4, 3, 6, 10, generator=generator).double(), torch.randint(2, (4,), generator=generator))
        for _ in range(5)
    ]
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.0, "fallback_lr": 0.02, "damping": 0.01}
    model = made()
    layers = ["image", "depthwise", "classifier", *OWNED]
    expected = run(model, layers, batches, loss, epoch=2, sharing=sharing, **settings)
    optimizer = FNGD(model, update="momentum", fallback="sgd", sharing=sharing, **settings)
    for step, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        loss(model, x, y).backward()
        optimizer.step()
        if step % 2:
            optimizer.end_epoch()
        torch.testing.assert_close([p.detach() for p in model.parameters()], expected[step], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("update", ["muon", "block_muon", "adam"])
def test_a_run_resumes(update: str) -> None:
    model, interrupted = made(), made()
    trained(update, model)
    state = through_file(trained(update, interrupted, range(3)).state_dict())
    again = made(seed=1)
    again.load_state_dict(interrupted.state_dict())
    optimizer = trained(update, again, range(0))
    optimizer.load_state_dict(state)
    trained(update, again, range(3, STEPS), optimizer)
    assert_equal(again, model)


# Checkpoints of before -------------------------------------------------------------------------------------


class Mixing(nn.Module):
    """As Mamba: of convolutions there are depthwise ones alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.out = nn.Conv2d(3, 6, 2, 2, groups=3), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.mix(self.embed(x).flatten(2).mT)))


def as_before(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a `Mixing` as it was when convolutions were none of the preconditioned layers."""
    state = copy.deepcopy(state)
    for group in state["param_groups"]:
        group["layers"] = [number - 1 for number in group["layers"]]
        group.pop("matrices", None)
    engine = state["param_groups"][0]["fngd"]["engine"]
    engine["layers"] = {name: engine["layers"][name] for name in ("mix", "out", "embed")}
    engine["policy"]["means"] = engine["policy"]["means"][[1, 2, 0]]
    return state


@pytest.mark.parametrize("change", [copy.deepcopy, as_before], ids=["today's", "before"])
def test_a_checkpoint_of_before_goes_on_where_convolutions_are_depthwise(
    change: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    def go_on(model: nn.Module, optimizer: FNGD, steps: range) -> None:
        for step in steps:
            for part in range(2):  # norms of the last step count
                backward(lambda x, of=part: model(x) * (1 + of), 2 * step + part)
            optimizer.step()
            optimizer.zero_grad()

    torch.manual_seed(0)
    model = Mixing().double()
    optimizer = FNGD(model, lr=LR)
    go_on(model, optimizer, range(3))
    again = copy.deepcopy(model)
    resumed = FNGD(again, lr=LR)
    resumed.load_state_dict(change(optimizer.state_dict()))
    for each in ((model, optimizer), (again, resumed)):
        go_on(*each, range(3, 6))
    assert_equal(again, model)
    assert [group["layers"] for group in resumed.param_groups] == [group["layers"] for group in optimizer.param_groups]


def test_a_checkpoint_of_before_is_refused_where_filters_had_the_fallback_rule() -> None:
    optimizer = trained("muon", model := made(), range(1))
    state = optimizer.state_dict()
    state["param_groups"] = state["param_groups"][2:]
    state["param_groups"][0]["fngd"] = optimizer.state_dict()["param_groups"][0]["fngd"]
    with pytest.raises(ValueError, match=r"has 3 parameter groups, this optimizer has 5; they differ in precondition"):
        FNGD(copy.deepcopy(model), lr=LR, sharing="uniform").load_state_dict(state)
