"""Subclasses of layers: those that compute what their base computes are taken, no others."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.nn import qat
from torch.ao.quantization import get_default_qat_qconfig
from torch.nn.utils import parametrizations, prune
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.models.efficientnet.modeling_efficientnet import EfficientNetDepthwiseConv2d
from transformers.models.esm.modeling_esmfold import EsmFoldLinear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderCTCHead
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter
from transformers.pytorch_utils import Conv1D

from hf_fngd import FNGDPreconditioner
from hf_fngd.layers.base import find_kernel
from hf_fngd.layers.select import select_layers
from tests.layers.cases import InheritingConv1D, InheritingConv2d, InheritingLinear

ROUTER = SimpleNamespace(
    hidden_size=4, num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.1, input_jitter_noise=0.1
)

Forward = Callable[..., Any]


def linear(forward: Forward, name: str = "Mine", **members: Any) -> nn.Module:
    """A Linear with a forward of its own."""
    return type(name, (nn.Linear,), {"forward": forward} | members)(4, 4)


def plain(self: Any, x: Tensor) -> Tensor:
    return F.linear(x, self.weight, self.bias)


def scripted(self: Any, x: Tensor) -> Tensor:
    """As timm's Linear."""
    if torch.jit.is_scripting():
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
    return F.linear(x, self.weight, self.bias)


def by_a_method(self: Any, x: Tensor) -> Tensor:
    y = self.multiply(x)
    return y if self.bias is None else y + self.bias


class Calling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


TAKEN = {
    "inherits": InheritingLinear(4, 4),
    "inherits, Conv1D": InheritingConv1D(4, 4),
    "inherits, Conv2d": InheritingConv2d(4, 4, 1),
    "ESMFold": EsmFoldLinear(4, 4),
    "Falcon": FalconLinear(4, 4),
    "Falcon, no bias": FalconLinear(4, 4, bias=False),
    "EfficientNet": EfficientNetDepthwiseConv2d(4),
    "calls that of its base": Calling(4, 4),
    "the same function": linear(plain),
    "for scripts": linear(scripted),
    "by a method": linear(by_a_method, multiply=lambda self, x: x @ self.weight.T),
    "in bfloat16": FalconLinear(4, 4).bfloat16(),
    "on no device": FalconLinear(4, 4, device="meta"),
}


@pytest.mark.parametrize("module", TAKEN.values(), ids=TAKEN)
def test_a_subclass_that_computes_the_same_has_the_kernel_of_its_base(module: nn.Module) -> None:
    bases = {nn.Linear: "linear", Conv1D: "conv1d", nn.Conv2d: "convolution"}
    state = torch.random.get_rng_state()
    assert find_kernel(module)[0] == next(name for base, name in bases.items() if isinstance(module, base))
    assert torch.equal(torch.random.get_rng_state(), state)


# Not taken -------------------------------------------------------------------------------------------------


def in_float32(self: Any, x: Tensor) -> Tensor:
    """Whatever autocast says."""
    with torch.autocast(x.device.type, enabled=False):
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias).to(x.dtype)


def remembers(self: Any, x: Tensor) -> Tensor:
    self.last = x
    return plain(self, x)


def until_adapted(self: Any, x: Tensor) -> Tensor:
    """As diffusers' LoRACompatibleLinear, whose adapter is added later."""
    return plain(self, x) if getattr(self, "adapter", None) is None else self.adapter(plain(self, x))


def guarded(self: Any, x: Tensor) -> Tensor:
    try:
        return plain(self, x) * self.scale
    except Exception:
        return plain(self, x)


FORWARDS: dict[str, tuple[Forward, str]] = {
    "a scale": (lambda self, x: F.linear(x, 1.001 * self.weight, self.bias), "something else"),
    "a scale that is 1 today": (lambda self, x: plain(self, x) * self.scale, "depends on its scale"),
    "an adapter to come": (until_adapted, "depends on its adapter"),
    "a failure that it hides": (guarded, "depends on its scale"),
    "writes an attribute": (remembers, "depends on its last"),
    "more arguments": (lambda self, x, scale=1.0: plain(self, x), "takes other arguments"),
    "a tuple": (lambda self, x: (plain(self, x), None), "something else"),
    "another shape": (lambda self, x: plain(self, x).flatten(1), "something else"),
    "another dtype": (lambda self, x: plain(self, x).double(), "something else"),
    "a view": (lambda self, x: plain(self, x).view((*x.shape[:-1], -1)), "something else"),
    "dropout in training": (lambda self, x: plain(self, F.dropout(x, 0.1, self.training)), "something else"),
    "large outputs are bounded": (lambda self, x: plain(self, x).clamp(-6e4, 6e4), "something else"),
    "no bias": (lambda self, x: F.linear(x, self.weight) + 0 * self.bias, "something else"),
    "no gradient of the input": (lambda self, x: plain(self, x.detach() + 0 * x), "something else"),
    "half a gradient of the weight": (
        lambda self, x: F.linear(x, (self.weight + self.weight.detach()) / 2, self.bias),
        "something else",
    ),
    "float32 under autocast": (in_float32, "something else"),
    "in place": (lambda self, x: plain(self, x.mul_(1)), "failed when tried"),
    "rounded": (lambda self, x: F.linear(x, self.weight.bfloat16().to(x.dtype), self.bias), "something else"),
}


@pytest.mark.parametrize(("forward", "reason"), FORWARDS.values(), ids=FORWARDS)
def test_a_forward_that_computes_something_else_is_not_taken(forward: Forward, reason: str) -> None:
    module = linear(forward, scale=1.0)
    assert find_kernel(module) == (None, None)
    with pytest.raises(ValueError, match=rf"nothing to precondition: .* not taken: 0 \(Mine: its forward .*{reason}"):
        select_layers(nn.Sequential(module), "all-linear", None)


def with_more(change: Callable[[nn.Module], Any], module: nn.Module | None = None) -> nn.Module:
    module = InheritingLinear(4, 4) if module is None else module
    change(module)
    return module


def computed(module: nn.Module) -> None:
    """A weight that is a property, as of layers with an equalized learning rate."""
    module.raw = module._parameters.pop("weight")
    module.__class__ = type("Equalized", (InheritingLinear,), {"weight": property(lambda self: 0.5 * self.raw)})


OTHERS = {
    "Idefics": IdeficsDecoupledLinear(4, 4, partially_freeze=False),
    "Idefics, a part of its own": IdeficsDecoupledLinear(4, 4, 2),
    "DeepSeek-V4": DeepseekV4GroupedLinear(4, 8, 2),
    "PhiMoE": PhimoeTopKRouter(ROUTER),
    "Llama 4": Llama4Router(ROUTER),
    "Parakeet": ParakeetEncoderCTCHead(4, 4, 1),
    "BiT": WeightStandardizedConv2d(4, 4, 1),
    "nn.MultiheadAttention": nn.MultiheadAttention(4, 2).out_proj,
    "quantization-aware": qat.Linear(4, 4, qconfig=get_default_qat_qconfig()),
    "spectral norm": parametrizations.spectral_norm(nn.Linear(4, 4)),
    "weight norm": parametrizations.weight_norm(InheritingLinear(4, 4)),
    "pruned": with_more(lambda module: prune.l1_unstructured(module, "weight", 0.5)),
    "a computed weight": with_more(computed),
    "integers": with_more(lambda module: setattr(module, "weight", nn.Parameter(torch.ones(4, 4).int(), False))),
    "a parameter more": with_more(lambda module: setattr(module, "gain", nn.Parameter(torch.ones(4)))),
    "a module more": with_more(lambda module: setattr(module, "adapter", nn.Linear(4, 4))),
    "a forward on the instance": with_more(lambda module: setattr(module, "forward", lambda x: 2 * x)),
    "a convolution's method": type("Mine", (nn.Conv2d,), {"_conv_forward": lambda *args: 2 * args[1]})(4, 4, 1),
    "a convolution's forward": type("Same", (nn.Conv2d,), {"forward": lambda self, x: F.pad(x, (1, 1))})(4, 4, 1),
    "a Conv1D's forward": type("Mine", (Conv1D,), {"forward": lambda self, x: 2 * x})(4, 4),
}


@pytest.mark.parametrize("module", OTHERS.values(), ids=OTHERS)
def test_any_other_subclass_keeps_its_plain_gradient(module: nn.Module) -> None:
    assert find_kernel(module) == (None, None)
    selection = select_layers(nn.ModuleList([module, nn.Linear(4, 4)]), "all-linear", None)
    assert not any(layer.module is module for layer in selection.attached)
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.requires_grad:
            assert "is not a preconditioned layer type" in selection.plain[f"0.{name}"]


def test_a_forward_that_is_patched_later_is_tried_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Calling(4, 4)
    assert find_kernel(module)[0] == "linear"
    monkeypatch.setattr(Calling, "forward", lambda self, x: 2 * x)
    assert find_kernel(module) == (None, None)


# What runs -------------------------------------------------------------------------------------------------


def test_its_own_forward_goes_on_to_run_and_a_call_that_is_not_linears_is_plain() -> None:
    """In half precision Falcon's rounds twice, and under autocast a bias makes its output float32."""
    model = nn.Sequential(FalconLinear(32, 32), nn.Linear(32, 2)).bfloat16()
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    own, once = model[0](x.bfloat16()), nn.Linear.forward(model[0], x.bfloat16())
    _kept = FNGDPreconditioner(model)
    assert torch.equal(model(x.bfloat16()), model[1](own))
    assert not torch.equal(own, once)
    model.float()
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda module, args, y: seen.append(y))
    with torch.autocast("cpu", torch.bfloat16):
        model(x).sum().backward()
    assert seen[0].dtype == torch.float32
    assert model[0].weight.grad.dtype == torch.float32
    report = _kept.coverage()
    assert not report.missed
