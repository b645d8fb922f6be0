"""The modules that the suite of the layer types goes through: a new type is a few rows of `CASES`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

SAMPLES, VOCABULARY = 5, 7


class Scaled(nn.Embedding):
    """As BART's and Gemma's."""

    def forward(self, ids: Tensor) -> Tensor:
        return 3 * super().forward(ids)


class InheritingLinear(nn.Linear):
    """As ESMFold's, which differs in its initialization."""


class InheritingConv1D(Conv1D):
    pass


class InheritingConv2d(nn.Conv2d):
    pass


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


def convolution(shape: tuple[int, ...], cls: type[nn.Module], *arguments: Any, **options: Any) -> Case:
    return Case("convolution", lambda bias: cls(*arguments, **options, bias=bias), shape)


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
    "Linear, a subclass": Case("linear", lambda bias: InheritingLinear(4, 3, bias), (3, 4)),
    "Linear, a forward of its own": Case("linear", lambda bias: FalconLinear(4, 3, bias), (3, 4)),
    "Conv1D": Case("conv1d", conv1d, (4,), GPT),
    "Conv1D, a subclass": Case("conv1d", lambda: InheritingConv1D(3, 4), (4,), GPT),
    "Conv1D, positions": Case("conv1d", conv1d, (3, 4), GPT),
    "Conv1D, not contiguous": Case("conv1d", conv1d, (2, 3, 4), GPT, spaced),
    "Embedding": Case("embedding", lambda: nn.Embedding(VOCABULARY, 4), (3,), NONE),
    "Embedding, padding": Case("embedding", lambda: nn.Embedding(VOCABULARY, 4, padding_idx=2), (3,), NONE),
    "Embedding, two dimensions": Case("embedding", lambda: nn.Embedding(VOCABULARY, 4), (2, 3), NONE),
    "Embedding, a subclass": Case("embedding", lambda: Scaled(VOCABULARY, 4), (3,), NONE),
    "Conv1d": convolution((2, 9), nn.Conv1d, 2, 4, 3),
    "Conv1d, same": convolution((2, 9), nn.Conv1d, 2, 4, 4, padding="same", dilation=2),
    "Conv1d, depthwise": convolution((4, 9), nn.Conv1d, 4, 4, 3, groups=4, padding="valid"),
    "Conv1d, patches": convolution((2, 9), nn.Conv1d, 2, 4, 3, stride=3),
    "Conv2d, uneven": convolution((2, 7, 6), nn.Conv2d, 2, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    "Conv2d, groups": convolution((4, 4, 3), nn.Conv2d, 4, 6, 3, groups=2, padding=1),
    "Conv2d, depthwise, several a channel": convolution((3, 4, 6), nn.Conv2d, 3, 6, 3, groups=3),
    "Conv2d, reflect": convolution((2, 4, 6), nn.Conv2d, 2, 3, 3, padding=1, padding_mode="reflect"),
    "Conv2d, circular, same": convolution((2, 4, 6), nn.Conv2d, 2, 3, (2, 3), padding="same", padding_mode="circular"),
    "Conv2d, channels last": replace(convolution((2, 4, 6), nn.Conv2d, 2, 4, 3), change=channels_last),
    "Conv2d, a subclass": convolution((2, 4, 6), InheritingConv2d, 2, 4, 3),
    "Conv2d, replicate": convolution(
        (3, 5, 7), nn.Conv2d, 3, 2, (2, 3), stride=(3, 2), padding=(2, 1), padding_mode="replicate"
    ),
    "Conv2d, points": convolution((3, 5, 3), nn.Conv2d, 3, 4, 1, stride=2),
    "Conv3d, depthwise, circular": convolution(
        (2, 3, 4, 5),
        nn.Conv3d,
        2,
        2,
        (1, 2, 3),
        groups=2,
        padding=(0, 1, 2),
        dilation=(1, 1, 2),
        padding_mode="circular",
    ),
    "Conv3d": convolution((2, 3, 4, 2), nn.Conv3d, 2, 3, (2, 3, 1), stride=(1, 2, 1), padding=1),
    "ConvTranspose1d": convolution((2, 4), nn.ConvTranspose1d, 2, 3, 3),
    "ConvTranspose2d": convolution(
        (4, 3, 2), nn.ConvTranspose2d, 4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2
    ),
    "ConvTranspose2d, room for another patch": convolution(
        (2, 3, 3), nn.ConvTranspose2d, 2, 4, (2, 3), stride=(1, 2), dilation=(3, 1), output_padding=(2, 1)
    ),
    "ConvTranspose1d, depthwise": convolution((3, 5), nn.ConvTranspose1d, 3, 6, 2, stride=3, groups=3, padding=1),
    "ConvTranspose3d": convolution((2, 2, 3, 2), nn.ConvTranspose3d, 2, 2, 2),
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


def inputs(case: Case, samples: int = SAMPLES, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same numbers in any precision, or ids."""
    generator = torch.Generator().manual_seed(seed)
    if case.type == "embedding":
        return torch.randint(VOCABULARY, (samples, *case.shape), generator=generator)
    return case.change(torch.randn(samples, *case.shape, generator=generator, dtype=torch.float64)).to(dtype)
