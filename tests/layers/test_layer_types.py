"""The suite that every layer type inherits: a new one is a few rows of `CASES`. And the registry."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from hf_fngd import FNGDPreconditioner
from hf_fngd.layers.base import _LAYER_TYPES, find_kernel, layer_type_names, register_layer_type
from tests.nets import EVERY_TYPE, gradient, relative_error
from tests.reference import Clipping, Dense, float64, per_sample_gradients, uses_of

SAMPLES, VOCABULARY = 5, 7
FIRST = 30.0  # how often the first sample counts


class Scaled(nn.Embedding):
    """As BART's and Gemma's."""

    def forward(self, ids: Tensor) -> Tensor:
        return 3 * super().forward(ids)


class Positions(nn.Module):
    """A table that is a parameter, and a token of one position in front, as a Vision Transformer has."""

    def __init__(self, token: bool = True) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4)) if token else None
        self.positions = nn.Parameter(torch.zeros(1, 3 + token, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.token is None else torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        return y + self.positions


@dataclass(frozen=True)
class Case:
    """A module and its input.

    Attributes:
        type: the name of its layer type.
        build: makes the module; takes ``bias`` where ``biases`` are more than one.
        shape: of a sample of its input.
        biases: which kinds of bias it may have, of "trained", "frozen" and "none".
        change: what is done to the input, such as another memory layout.
    """

    type: str
    build: Callable[..., nn.Module]
    shape: tuple[int, ...]
    biases: tuple[str, ...] = ("trained", "frozen", "none")
    change: Callable[[Tensor], Tensor] = lambda x: x

    def module(self, bias: str) -> nn.Module:
        made = self.build(**({"bias": bias != "none"} if len(self.biases) > 2 else {}))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in made.parameters():
                p.copy_(0.5 + 0.3 * torch.randn(p.shape, generator=generator))
        if bias == "frozen":
            made.bias.requires_grad_(False)
        return made.double()


def convolution(cls: type[nn.Module], *arguments: Any, **options: Any) -> Callable[..., nn.Module]:
    return lambda bias: cls(*arguments, **options, bias=bias)


def strided(x: Tensor) -> Tensor:
    """The same values, which are not contiguous."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def spaced(x: Tensor) -> Tensor:
    """The same values with gaps between them in memory, which can be flattened."""
    return torch.stack([x, x], dim=-1)[..., 0]


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def linear(bias: bool) -> nn.Module:
    return nn.Linear(4, 3, bias=bias)


def conv1d() -> nn.Module:
    return Conv1D(3, 4)


NONE, GPT = ("none",), ("trained", "frozen")
CASES = {
    "Linear": Case("linear", linear, (4,)),
    "Linear, positions": Case("linear", linear, (3, 4)),
    "Linear, two dimensions of positions": Case("linear", linear, (2, 3, 4)),
    "Linear, not contiguous": Case("linear", linear, (3, 4), change=strided),
    "Linear, one input for all samples": Case("linear", linear, (3, 4), change=lambda x: x[:1].expand_as(x)),
    "Conv1D": Case("conv1d", conv1d, (4,), GPT),
    "Conv1D, positions": Case("conv1d", conv1d, (3, 4), GPT),
    "Conv1D, not contiguous": Case("conv1d", conv1d, (2, 3, 4), GPT, spaced),
    "Embedding": Case("embedding", lambda: nn.Embedding(VOCABULARY, 4), (3,), NONE),
    "Embedding, padding": Case("embedding", lambda: nn.Embedding(VOCABULARY, 4, padding_idx=2), (3,), NONE),
    "Embedding, two dimensions": Case("embedding", lambda: nn.Embedding(VOCABULARY, 4), (2, 3), NONE),
    "Embedding, a subclass": Case("embedding", lambda: Scaled(VOCABULARY, 4), (3,), NONE),
    "Conv1d": Case("convolution", convolution(nn.Conv1d, 2, 4, 3), (2, 9)),
    "Conv1d, same": Case("convolution", convolution(nn.Conv1d, 2, 4, 4, padding="same", dilation=2), (2, 9)),
    "Conv1d, depthwise": Case("convolution", convolution(nn.Conv1d, 4, 4, 3, groups=4, padding="valid"), (4, 9)),
    "Conv1d, patches": Case("convolution", convolution(nn.Conv1d, 2, 4, 3, stride=3), (2, 9)),
    "Conv2d, uneven": Case(
        "convolution", convolution(nn.Conv2d, 2, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (2, 7, 6)
    ),
    "Conv2d, groups": Case("convolution", convolution(nn.Conv2d, 4, 6, 3, groups=2, padding=1), (4, 4, 3)),
    "Conv2d, depthwise, several a channel": Case("convolution", convolution(nn.Conv2d, 3, 6, 3, groups=3), (3, 4, 6)),
    "Conv2d, reflect": Case(
        "convolution", convolution(nn.Conv2d, 2, 3, 3, padding=1, padding_mode="reflect"), (2, 4, 6)
    ),
    "Conv2d, circular, same": Case(
        "convolution", convolution(nn.Conv2d, 2, 3, (2, 3), padding="same", padding_mode="circular"), (2, 4, 6)
    ),
    "Conv2d, channels last": Case("convolution", convolution(nn.Conv2d, 2, 4, 3), (2, 4, 6), change=channels_last),
    "Conv3d": Case("convolution", convolution(nn.Conv3d, 2, 3, (2, 3, 1), stride=(1, 2, 1), padding=1), (2, 3, 4, 2)),
    "ConvTranspose1d": Case("convolution", convolution(nn.ConvTranspose1d, 2, 3, 3), (2, 4)),
    "ConvTranspose2d": Case(
        "convolution",
        convolution(nn.ConvTranspose2d, 4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2),
        (4, 3, 2),
    ),
    "ConvTranspose3d": Case("convolution", convolution(nn.ConvTranspose3d, 2, 2, 2), (2, 2, 3, 2)),
    "LayerNorm": Case("norm", lambda bias: nn.LayerNorm(4, bias=bias), (4,)),
    "LayerNorm, positions": Case("norm", lambda bias: nn.LayerNorm(4, bias=bias), (3, 4)),
    "LayerNorm, not contiguous": Case("norm", lambda bias: nn.LayerNorm(4, bias=bias), (3, 4), change=strided),
    "LayerNorm, several dimensions": Case("norm", lambda bias: nn.LayerNorm((3, 4), bias=bias), (2, 3, 4)),
    "RMSNorm": Case("norm", lambda: nn.RMSNorm(4), (3, 4), NONE),
    "RMSNorm, one position": Case("norm", lambda: nn.RMSNorm(4, eps=0.1), (4,), NONE),
    "LlamaRMSNorm": Case("norm", lambda: LlamaRMSNorm(4), (3, 4), NONE),
    "T5LayerNorm": Case("norm", lambda: T5LayerNorm(4), (3, 4), NONE),
    "GemmaRMSNorm": Case("norm", lambda: GemmaRMSNorm(4), (3, 4), NONE),
    "Qwen3RMSNorm, per head": Case("norm", lambda: Qwen3RMSNorm(4), (2, 3, 4), NONE),
    "Table": Case("table", lambda: Positions(token=False), (3, 4), NONE),
    "Table, a token": Case("table", Positions, (3, 4), NONE),
}
WITH_BIAS = [pytest.param(case, bias, id=f"{name}-{bias}") for name, case in CASES.items() for bias in case.biases]
ONCE = [pytest.param(case, case.biases[0], id=name) for name, case in CASES.items()]


class Around(nn.Module):
    """The module, and a head on what it returns."""

    checkpointing = False

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.module = module
        self.head = nn.Linear(module(x).flatten(1).shape[1], 3).double()

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.recomputed, x, use_reentrant=False) if self.checkpointing else self.module(x)
        return self.head(y.flatten(1))

    def recomputed(self, x: Tensor) -> Tensor:
        with float64():
            return self.module(x)


class Changed(Around):
    """Changes the module's output in place."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.module(x).mul_(2).flatten(1))


def inputs(case: Case, samples: int = SAMPLES, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if case.type == "embedding":
        return torch.randint(VOCABULARY, (samples, *case.shape), generator=generator)
    return case.change(torch.randn(samples, *case.shape, generator=generator, dtype=torch.float64))


def losses(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The samples' losses ``[N]``, the first of which counts 30 times."""
    with float64():
        each = model(x).square().sum(dim=1)
    return each * torch.tensor([FIRST] + [1.0] * (len(x) - 1))


def alone(model: nn.Module, x: Tensor, n: int) -> Tensor:
    """The loss of a sample that runs through the model by itself."""
    return model(x[n : n + 1]).square().sum() * (1.0 if n else FIRST)


def models(case: Case, bias: str, cls: type[Around] = Around, **settings: Any) -> tuple[Around, Around, Any]:
    """A plain model, the same attached, and what it is attached to."""
    torch.manual_seed(0)
    with float64():
        plain = cls(case.module(bias), inputs(case))
    model = copy.deepcopy(plain)
    return plain, model, FNGDPreconditioner(model, **({"layer_types": EVERY_TYPE} | settings))


def clipped(case: Case, plain: Around, x: Tensor) -> dict[str, Tensor]:
    """The gradients of ``sharing="clipped"``, sample by sample."""
    trained = [name for name, p in plain.named_parameters() if p.requires_grad]

    with float64():
        samples = [
            uses_of(plain, ["module", "head"], lambda plain, n: alone(plain, x, n), n, trained) for n in range(len(x))
        ]
    found, norms = Clipping().gradients(samples)
    for name, of in norms.items():
        assert name.startswith("head") or float((of.mean() / of).min()) < 0.7
    return {name: g.view_as(plain.get_parameter(name)) for name, g in found.items()}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_same(found: Tensor, own: Tensor, case: Case) -> None:
    """Bit for bit, but for a matrix product of rows that are not contiguous, which torch may compute in another way."""
    assert found.dtype == own.dtype
    if case.change is strided and own.dtype == torch.bfloat16:
        torch.testing.assert_close(found, own)
    else:
        assert torch.equal(found, own)


# Plain gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Around, Changed])
@pytest.mark.parametrize(("case", "bias"), WITH_BIAS)
def test_with_weights_of_one_everything_is_the_modules_own(case: Case, bias: str, cls: type[Around]) -> None:
    plain, model, _ = models(case, bias, cls, sharing="uniform")
    assert find_kernel(model.module)[0] == case.type
    gradients = []
    for each in (plain, model):
        x = inputs(case)
        x = x.requires_grad_() if x.is_floating_point() else x
        y = each(x)
        y.square().sum().backward()
        gradients.append([y.detach(), x.grad, *(p.grad for p in each.parameters())])
    for place, (found, expected) in enumerate(zip(*reversed(gradients), strict=True)):
        if place == 0:
            assert torch.equal(found, expected)
        elif expected is None:
            assert found is None
        else:
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found, expected, rtol=1e-6 if "RMS" in repr(plain) else 1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("case", "bias"), ONCE)
def test_the_forward_is_the_modules_own_in_any_precision(case: Case, bias: str, dtype: torch.dtype) -> None:
    plain, model, _ = models(case, bias)
    x = inputs(case)
    x = x.to(dtype) if x.is_floating_point() else x
    assert_same(model.to(dtype)(x), plain.to(dtype)(x), case)


# Sample weights --------------------------------------------------------------------------------------------


def eager(model: Around) -> Callable[[Tensor], Tensor]:
    return model


def compiled(model: Around) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def checkpointed(model: Around) -> Callable[[Tensor], Tensor]:
    model.checkpointing = True
    return model


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("way", [eager, compiled, checkpointed])
@pytest.mark.parametrize(("case", "bias"), WITH_BIAS)
def test_the_gradient_is_the_sum_of_the_clipped_samples(case: Case, bias: str, way: Callable[..., Any]) -> None:
    plain, model, preconditioner = models(case, bias)
    called = way(model)
    for samples in (SAMPLES, 3) if way is not compiled else (SAMPLES,):
        x = inputs(case, samples, seed=samples)
        model.zero_grad()
        losses(called, x).sum().backward()
        expected = clipped(case, plain, x)
        preconditioner.step()
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert relative_error(p.grad, expected[name]) < 1e-9, name
            else:
                assert p.grad is None
    report = preconditioner.coverage()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {*report.preconditioned, *report.weighed} == trained
    own = [name for name in trained if name.startswith("module")]
    assert set(own) <= set(report.preconditioned if case.type in ("linear", "conv1d") else report.weighed)


GRAM = [parameter for parameter in WITH_BIAS if parameter.values[0].type in ("linear", "conv1d")]


@pytest.mark.parametrize(("case", "bias"), GRAM)
def test_with_a_gram_matrix_it_is_that_of_equation_9(case: Case, bias: str) -> None:
    plain, model, preconditioner = models(case, bias, sharing="never", damping=0.01)
    x = inputs(case)
    losses(model, x).sum().backward()
    trained = [p for p in plain.module.parameters() if p.requires_grad]
    u = per_sample_gradients(plain, trained, lambda plain, n: SAMPLES * alone(plain, x, n), SAMPLES)
    assert relative_error(gradient(model.module), Dense(u, 0.01).p) < 1e-9
    preconditioner.step()
    assert preconditioner.coverage().missed == {}


@pytest.mark.parametrize(("case", "bias"), ONCE)
def test_autocast(case: Case, bias: str) -> None:
    found = []
    for enabled in (True, False):
        plain, model, _ = models(case, bias)
        plain, model, x = plain.float(), model.float(), inputs(case)
        x = x.float() if x.is_floating_point() else x
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = model(x)
            assert_same(y, plain(x), case)
        losses(lambda _, y=y: y.float(), x).sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
        found.append(gradient(model))
    assert relative_error(*found) < 0.03


@pytest.mark.parametrize(("case", "bias"), ONCE)
def test_a_type_that_is_not_named_stays_plain(case: Case, bias: str) -> None:
    others = ["linear"] if case.type != "linear" else ["conv1d"]
    if case.type == "linear":
        with pytest.raises(ValueError, match="nothing to precondition"):
            models(case, bias, layer_types=others)
        return
    plain, model, preconditioner = models(case, bias, layer_types=others)
    x = inputs(case)
    for each in (plain, model):
        losses(each, x).sum().backward()
    preconditioner.step()
    for (name, p), q in zip(model.module.named_parameters(prefix="module"), plain.module.parameters(), strict=True):
        assert name in preconditioner.coverage().plain
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)


# The registry ----------------------------------------------------------------------------------------------


def test_the_cases_cover_every_registered_type_and_all_but_norms_are_weighed_by_default() -> None:
    assert set(layer_type_names()) == {case.type for case in CASES.values()}
    assert set(layer_type_names()) - set(layer_type_names(default=True)) == {"norm"}


class CustomLinear(nn.Linear):
    """Any subclass may compute something else."""


class CustomConv(nn.Conv2d):
    pass


class Shifted(nn.Module):
    """A norm that adds its vector."""

    def __init__(self, name: str = "weight") -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.ones(4)))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (4,)) @ torch.diag(self.weight)


ShiftedNorm = type("ShiftedNorm", (Shifted,), {})


@pytest.mark.parametrize(
    "module",
    [
        CustomLinear(2, 2),
        CustomConv(2, 2, 2),
        nn.Bilinear(2, 2, 2),
        nn.LayerNorm(2, elementwise_affine=False),
        nn.RMSNorm(2, elementwise_affine=False),
        nn.GroupNorm(1, 2),
        nn.BatchNorm1d(2),
        ShiftedNorm(),  # whose forward takes a vector alone
        ShiftedNorm("gain"),
    ],
    ids=lambda module: type(module).__name__,
)
def test_other_modules_have_no_kernel(module: nn.Module) -> None:
    assert find_kernel(module)[1] is None


@pytest.mark.parametrize("name", layer_type_names())
def test_a_name_cannot_be_registered_twice(name: str) -> None:
    with pytest.raises(ValueError, match=f"already a layer type named '{name}'"):
        register_layer_type(name)(lambda module: None)


def test_a_new_type_is_one_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_fngd.layers.base._LAYER_TYPES", dict(_LAYER_TYPES))
    kernel = find_kernel(nn.Linear(2, 2))[1]
    register_layer_type("mine")(lambda module: kernel if type(module) is CustomLinear else None)
    assert find_kernel(CustomLinear(2, 2)) == ("mine", kernel)
    assert "mine" in layer_type_names()
