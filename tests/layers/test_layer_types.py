"""The suite that every layer type inherits, on the modules of `CASES`. And the registry."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_fngd import FNGD, FNGDPreconditioner
from hf_fngd.layers.base import _LAYER_TYPES, find_kernel, layer_type_names, register_layer_type
from tests.layers.cases import CASES, SAMPLES, Case, inputs, strided
from tests.nets import EVERY_TYPE
from tests.reference import Clipping, Dense, float64, per_sample_gradients, uses_of
from tests.steps import gradient, relative_error

pytestmark = pytest.mark.usefixtures("fresh_compiler")
FIRST = 30.0  # how often the first sample counts
PRECONDITIONED = ("linear", "conv1d", "convolution")
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
    x = inputs(case, dtype=dtype)
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
    assert set(own) <= set(report.preconditioned if case.type in PRECONDITIONED else report.weighed)


GRAM = [parameter for parameter in WITH_BIAS if parameter.values[0].type in PRECONDITIONED]


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
        plain, model, x = plain.float(), model.float(), inputs(case, dtype=torch.float32)
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
    """A subclass that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class CustomConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (1, 1)))


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


def test_a_convolution_whose_padding_is_changed_pads_so() -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 4, 3, padding=1)
    model = nn.Sequential(convolution, nn.Flatten(), nn.Linear(64, 2))
    optimizer, x = FNGD(model), torch.randn(5, 3, 4, 4)
    for mode in ("zeros", "circular"):  # for seamless images
        convolution.padding_mode = mode
        convolution._reversed_padding_repeated_twice = [1, 1, 1, 1]
        optimizer.zero_grad()
        found = model.train()(x)
        torch.testing.assert_close(found, model.eval()(x))
        found.sum().backward()
        optimizer.step()
