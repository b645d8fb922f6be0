"""Layers that cannot be preconditioned: they get plain gradients, and the coverage report says so, once."""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fngd import CoverageReport, FNGDPreconditioner
from hf_fngd.engine.reasons import CALLED_AGAIN, NEVER_CALLED, USED_ELSEWHERE
from hf_fngd.layers.base import AMBIGUOUS
from hf_fngd.samples.rows import NOT_THE_BATCH
from tests.nets import CLASSES, EVERY_TYPE, LAYER_NAMES, Elsewhere, Net, Twice, data, loss, net, settings_of
from tests.steps import one_step, with_engine

# How the report reads --------------------------------------------------------------------------------------


def test_reasons_are_grouped_and_long_lists_cut() -> None:
    report = CoverageReport(
        preconditioned=("fc.weight",),
        plain={"norm.weight": "a norm", "norm.bias": "a norm", "head.weight": "tied"},
        missed={f"layers.{n}.weight": "called twice" for n in range(6)},
    )
    assert str(report).splitlines() == [
        "FNGD preconditions 1 parameters.",
        "  2 plain gradient: a norm (norm.weight, norm.bias)",
        "  1 plain gradient: tied (head.weight)",
        "  6 could not be weighed: called twice (layers.0.weight, layers.1.weight, layers.2.weight, "
        "layers.3.weight, and 2 more)",
    ]


def test_the_report_tells_what_became_of_every_parameter() -> None:
    model, preconditioner = with_engine(exclude_modules="fc1", layer_types=["linear"])
    before = preconditioner.coverage()
    one_step(model, preconditioner, *data(4))
    report = preconditioner.coverage()
    assert before == report
    assert report.preconditioned == ("fc2.weight", "fc2.bias")
    assert report.plain == {
        "fc1.weight": "among exclude_modules",
        "fc1.bias": "among exclude_modules",
        "norm.weight": "LayerNorm: 'norm' is not among layer_types",
        "norm.bias": "LayerNorm: 'norm' is not among layer_types",
    }
    assert report.missed == {}
    assert report.weighed == ()
    assert str(CoverageReport(("a", "b"), {}, {})) == "FNGD preconditions 2 parameters."
    model = net()
    report = FNGDPreconditioner(model, layer_types=EVERY_TYPE).coverage()
    assert report.weighed == ("norm.weight", "norm.bias")
    assert str(report) == "FNGD preconditions 4 parameters, and weighs the samples in norm.weight, norm.bias."


# What is reported ------------------------------------------------------------------------------------------


class Folded(Net):
    """Folds positions into the batch before its second layer, as OPT does."""

    def head(self, hidden: Tensor) -> Tensor:
        return self.fc2(hidden.flatten(0, 1)).view(*hidden.shape[:2], CLASSES).mean(1)


class Unprobed(Net):
    """Cannot run in evaluation, as a probe wants it to: sizes have to tell."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.training
        return super().forward(x)


class UnprobedFolded(Folded, Unprobed):
    pass


class Unused(Net):
    """Never calls its second layer."""

    def head(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.fc2.weight, self.fc2.bias)


@dataclass
class Output:
    logits: Tensor
    features: Tensor | None = None


class Behind(Elsewhere):
    """Its output is a dataclass."""

    def forward(self, x: Tensor) -> Output:  # type: ignore[override]
        return Output(super().forward(x))


def value(model: Net, x: Tensor, y: Tensor) -> Tensor:
    output = model(x)
    return F.cross_entropy(output.logits if isinstance(output, Output) else output, y)


OBSTACLES: dict[str, tuple[type[Net], tuple[int, ...], dict[str, str]]] = {
    "called twice": (Twice, (), {"again": CALLED_AGAIN}),
    "folded": (UnprobedFolded, (3,), {"fc2": NOT_THE_BATCH}),
    "unused": (Unused, (), {"fc2": NEVER_CALLED}),
    "as many positions as samples": (Unprobed, (7,), {"fc1": AMBIGUOUS, "fc2": AMBIGUOUS}),
    "used elsewhere": (Elsewhere, (), {"fc2": USED_ELSEWHERE}),
    "used elsewhere, behind a dataclass": (Behind, (), {"fc2": USED_ELSEWHERE}),
}


@pytest.mark.parametrize(("model_type", "between", "reasons"), OBSTACLES.values(), ids=OBSTACLES)
@pytest.mark.parametrize("sharing", ["never", "replay", "clipped"])
def test_layers_that_cannot_be_weighed_get_plain_gradients_and_a_report(
    model_type: type[Net],
    between: tuple[int, ...],
    reasons: dict[str, str],
    sharing: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if sharing == "clipped" and model_type is Twice:
        reasons = {}  # weighed call by call
    model = net(cls=model_type)
    x, y = data(7, *between)
    x[3] *= 1e3
    # The layers above get plain or weighted gradients: neither changes what flows down.
    plain = torch.autograd.grad(value(model, x, y), list(model.parameters()))
    expected = dict(zip((name for name, _ in model.named_parameters()), plain, strict=True))
    preconditioner = FNGDPreconditioner(model, **settings_of(sharing, damping=0.01, coefficient_steps=1))
    for number in range(3):
        model.zero_grad()
        with caplog.at_level(logging.WARNING, logger="hf_fngd"):
            value(model, x, y).backward()
            preconditioner.step()
        for layer in {"fc1", "fc2", *reasons}:
            found = model.get_submodule(layer).weight.grad
            # What is used elsewhere is known when the first forward pass has been.
            late = number == 0 and reasons.get(layer) == USED_ELSEWHERE
            assert late or torch.allclose(found, expected[f"{layer}.weight"], rtol=1e-10) == (layer in reasons)
    report = preconditioner.coverage()
    assert report.missed == {
        f"{layer}.{leaf}": reason for layer, reason in reasons.items() for leaf in ("weight", "bias")
    }
    assert len(caplog.records) == (len(reasons) > 0)  # once, not in every step
    for reason in reasons.values():
        assert reason in caplog.text


@pytest.mark.parametrize(
    ("model", "inside"),
    [
        (nn.MultiheadAttention(4, 2), ["", "out_proj"]),
        (nn.GRU(4, 4), [""]),
        (nn.Bilinear(4, 4, 4), [""]),
        (nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 1)), ["", "parametrizations.weight"]),
        (nn.Module(), [""]),  # with experts
    ],
)
def test_strict_names_matrices_of_no_layer_type_at_once(model: nn.Module, inside: list[str]) -> None:
    if not list(model.parameters()):
        model.experts = nn.Parameter(torch.ones(2, 4, 4))
    model = nn.ModuleDict({"inner": model, "head": nn.Linear(4, 4)})
    FNGDPreconditioner(model).detach()
    with pytest.raises(ValueError, match=r"strict=True: \d matri\w+ cannot be weighed: inner\..* exclude_modules"):
        FNGDPreconditioner(model, strict=True)
    excluded = ["inner" + (name and f".{name}") for name in inside]
    report = FNGDPreconditioner(model, strict=True, exclude_modules=excluded).coverage()
    assert set(report.plain.values()) == {"among exclude_modules"}


@pytest.mark.parametrize(("model_type", "between", "reasons"), OBSTACLES.values(), ids=OBSTACLES)
def test_strict_raises_in_the_first_step(
    model_type: type[Net], between: tuple[int, ...], reasons: dict[str, str]
) -> None:
    model, preconditioner = with_engine(net(cls=model_type), strict=True, sharing="never")
    value(model, *data(7, *between)).backward()
    with pytest.raises(RuntimeError, match=r"(?s)strict=True: .*exclude_modules"):
        preconditioner.step()
    preconditioner.detach()
    others = [layer for layer in LAYER_NAMES if layer not in reasons]
    if others:
        preconditioner = FNGDPreconditioner(model, strict=True, sharing="never", exclude_modules=sorted(reasons))
        value(model, *data(7, *between)).backward()
        preconditioner.step()


class Routed(Net):
    """Sends the first tokens of the batch through a layer, ``[tokens, features]``, as a mixture of experts does."""

    tokens = 0

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        hidden = torch.cat([self.fc1(tokens[: self.tokens]), self.fc1.weight.new_ones(len(tokens) - self.tokens, 7)])
        return self.fc2(hidden.view(*x.shape[:2], 7)).mean(1)


@pytest.mark.parametrize("sharing", ["never", "clipped"])
def test_an_expert_that_got_as_many_tokens_as_there_are_samples_stays_plain(sharing: str) -> None:
    (model, preconditioner), (x, y) = with_engine(net(cls=Routed), sharing=sharing), data(7, 3)
    for model.tokens in (9, 7, 8):
        model.zero_grad()
        expected = torch.autograd.grad(loss(model, x, y), [*model.fc1.parameters()])
        one_step(model, preconditioner, x, y)
        torch.testing.assert_close([p.grad for p in model.fc1.parameters()], [*expected], rtol=1e-12, atol=1e-14)
        assert {"fc1.weight", "fc1.bias"} <= set(preconditioner.coverage().missed)


@dataclass
class Inputs:
    x: Tensor


class Wrapped(Net):
    """Takes its batch in a list, a tuple, a dataclass, or a dictionary of these."""

    def forward(self, batch: Any) -> Tensor:  # type: ignore[override]
        while not isinstance(batch, Tensor):
            batch = batch.x if isinstance(batch, Inputs) else batch["x"] if isinstance(batch, dict) else batch[0]
        return super().forward(batch)


def in_a_circle(x: Tensor) -> list[Any]:
    circle: list[Any] = [Inputs(x)]
    circle.append(circle)
    return [circle[0], circle]


@pytest.mark.parametrize("wrap", [in_a_circle, lambda x: [x], lambda x: (x, 1), Inputs, lambda x: {"x": [Inputs(x)]}])
def test_a_batch_is_found_in_what_holds_it(wrap: Callable[[Tensor], Any]) -> None:
    (model, preconditioner), (x, y) = with_engine(net(cls=Wrapped), strict=True), data(7, 3)
    F.cross_entropy(model(wrap(x)), y).backward()
    preconditioner.step()
    assert preconditioner.diagnostics()["weight_spread"] > 0


class Tokens(nn.Module):
    """An embedding whose output stops having the batch in front."""

    swapped = False

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(9, 5), nn.Linear(5, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.table(ids.t()).transpose(0, 1) if self.swapped else self.table(ids)
        return self.fc(rows).mean(1)


@pytest.mark.parametrize("strict", [False, True])
def test_strict_and_the_log_are_about_other_layers_too(strict: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = Tokens()
    preconditioner = FNGDPreconditioner(model, strict=strict)
    ids = torch.arange(18).view(6, 3) % 9
    model(ids).square().sum().backward()
    preconditioner.step()
    assert not caplog.records
    model.swapped = True
    model(ids).square().sum().backward()
    if strict:
        with pytest.raises(RuntimeError, match=f"(?s)strict=True: .*{NOT_THE_BATCH}.*table.weight"):
            preconditioner.step()
        return
    preconditioner.step()
    (record,) = caplog.records
    assert NOT_THE_BATCH in record.getMessage()
    assert preconditioner.coverage().plain == {"table.weight": NOT_THE_BATCH}


def test_training_in_evaluation_mode_is_reported() -> None:
    model = net().eval()
    preconditioner = FNGDPreconditioner(model)
    one_step(model, preconditioner, *data(6, 3))
    assert set(preconditioner.coverage().missed.values()) == {NEVER_CALLED}
    preconditioner.detach()

    strict = FNGDPreconditioner(model, strict=True)
    loss(model, *data(6, 3)).backward()
    with pytest.raises(RuntimeError, match="strict=True"):
        strict.step()


@pytest.mark.parametrize(("samples", "parts", "warned"), [(1, 1, 1), (2, 1, 0), (1, 2, 0)])
def test_a_single_sample_is_remarked_once_unless_there_are_other_micro_batches(
    samples: int, parts: int, warned: int, caplog: pytest.LogCaptureFixture
) -> None:
    model, preconditioner = with_engine()
    for _ in range(3):
        for seed in range(parts):
            loss(model, *data(samples, 3, seed=seed)).backward()
        preconditioner.step()
    remark = "the first micro-batch holds one sample.* unless position_ids that restart"
    assert len(re.findall(remark, caplog.text)) == warned
