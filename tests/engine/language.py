"""A language model with tables, a tied head and one outlier a batch; its steps, and its gradients by the oracle."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hf_fngd import FNGDPreconditioner
from tests.nets import EVERY_TYPE
from tests.reference import Clipping, uses_of

VOCABULARY, LENGTH, WIDTH = 11, 3, 4
TABLE, POSITIONS = "tokens.weight", "positions.weight"
OUTLIER = 100.0  # how often the first sample counts


class LanguageModel(nn.Module):
    """Two tables, two layers, one of which is left out, a norm, and a head that shares the tokens' table."""

    def __init__(self, checkpointing: bool | None = None, tied: bool = True) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.left_out = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.tokens = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def embed(self, x: Tensor) -> Tensor:
        return self.tokens(x) + self.positions(torch.arange(LENGTH)[None])

    def body(self, y: Tensor) -> Tensor:
        return self.norm(y + self.left_out(torch.tanh(self.fc(y))))

    def logits(self, y: Tensor) -> Tensor:
        return self.head(y)

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointing is None:
            return self.logits(self.body(self.embed(x)))
        y = self.embed(x) if self.checkpointing else checkpoint(self.embed, x, use_reentrant=False)
        return self.logits(checkpoint(self.body, y, use_reentrant=self.checkpointing))


def model(cls: type[LanguageModel] = LanguageModel, **kwargs: Any) -> LanguageModel:
    torch.manual_seed(0)
    return cls(**kwargs).double()


def batch(samples: int, seed: int = 1) -> Tensor:
    return torch.randint(1, VOCABULARY, (samples, LENGTH), generator=torch.Generator().manual_seed(seed))


def losses(net: Callable[..., Tensor], x: Tensor, y: Tensor | None = None) -> Tensor:
    """The samples' losses ``[N]``, by default for the batch's ids in another order."""
    y = x.roll(1, 0) if y is None else y
    each = F.cross_entropy(net(x).transpose(1, 2), y, reduction="none").mean(1)
    return each * torch.tensor([OUTLIER] + [1.0] * (len(x) - 1))


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def plain(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """By autograd alone."""
    own = copy.deepcopy(net)
    own.zero_grad()
    losses(own, x).sum().backward()
    return gradients(own)


def clipped(net: nn.Module, x: Tensor, *modules: str) -> dict[str, Tensor]:
    """With the samples clipped in these modules, by the oracle."""
    own, labels = copy.deepcopy(net), x.roll(1, 0)
    own.checkpointing = None

    def alone(model: nn.Module, n: int) -> Tensor:
        return losses(model, x[n : n + 1], labels[n : n + 1]).sum() / (OUTLIER if n else 1.0)

    trained = {name for name, _ in own.named_parameters()}
    found, norms = Clipping().gradients([uses_of(own, modules, alone, n, trained) for n in range(len(x))])
    assert all(of.max() > 2 * of.mean() or not of.any() for of in norms.values())
    return {name: g.view_as(own.get_parameter(name)) for name, g in found.items()}


def check(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *names: str) -> None:
    for name in names or expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12)


def attach(net: nn.Module, **settings: Any) -> FNGDPreconditioner:
    return FNGDPreconditioner(net, **({"exclude_modules": ["left_out"], "layer_types": EVERY_TYPE} | settings))


def step(net: Callable[..., Tensor], preconditioner: FNGDPreconditioner, x: Tensor) -> dict[str, Tensor]:
    """The gradients of one."""
    for p in preconditioner.model.parameters():
        p.grad = None
    losses(net, x).sum().backward()
    preconditioner.step()
    return gradients(preconditioner.model)


def reasons(preconditioner: FNGDPreconditioner, name: str = TABLE) -> str:
    return preconditioner.coverage().plain[name]
