"""A language model with tables, a tied head and one outlier a batch, for the tests of ``weigh_rest``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hf_fngd import FNGDPreconditioner
from hf_fngd.sharing import SharingPolicy

VOCABULARY, LENGTH, WIDTH = 11, 3, 4
TABLE = "tokens.weight"
PLAIN = ["positions.weight", "norm.weight", "norm.bias", "left_out.weight", "left_out.bias"]


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
        return self.tokens(x) + self.positions(torch.arange(LENGTH))

    def body(self, y: Tensor) -> Tensor:
        return self.norm(y + self.left_out(torch.tanh(self.fc(y))))

    def logits(self, y: Tensor) -> Tensor:
        return self.head(y)

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointing is None:
            return self.logits(self.body(self.embed(x)))
        y = self.embed(x) if self.checkpointing else checkpoint(self.embed, x, use_reentrant=False)
        return self.logits(checkpoint(self.body, y, use_reentrant=self.checkpointing))


def model(dtype: torch.dtype = torch.float64, cls: type[LanguageModel] = LanguageModel, **kwargs: Any) -> LanguageModel:
    torch.manual_seed(0)
    return cls(**kwargs).to(dtype)


def batch(samples: int, seed: int = 1) -> Tensor:
    return torch.randint(1, VOCABULARY, (samples, LENGTH), generator=torch.Generator().manual_seed(seed))


def losses(net: Callable[..., Tensor], x: Tensor, **kwargs: Any) -> Tensor:
    """The samples' losses ``[N]``, the first of which counts 100 times."""
    logits = net(x, **kwargs)
    each = F.cross_entropy(logits.transpose(1, 2), x.roll(1, 0), reduction="none").mean(1)
    return each * torch.tensor([100.0] + [1.0] * (len(x) - 1))


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def weighted(net: nn.Module, x: Tensor, w: Tensor | None = None) -> dict[str, Tensor]:
    """The weighted sums of the plain per-sample gradients, by autograd alone; w = 1 where not given."""
    plain = copy.deepcopy(net)
    plain.zero_grad()
    (losses(plain, x).mul(torch.ones(len(x)) if w is None else w).mean()).backward()
    return gradients(plain)


def check(found: dict[str, Tensor], expected: dict[str, Tensor], *names: str) -> None:
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-14)


def attach(net: nn.Module, sharing: str | SharingPolicy = "last", **kwargs: Any) -> FNGDPreconditioner:
    arguments = {"coefficient_steps": 1, "refresh": 0, "exclude_modules": ["left_out"]} | kwargs
    return FNGDPreconditioner(net, 0.1, sharing=sharing, **arguments)


def after_a_coefficient_step(net: nn.Module, sharing: str = "last", **kwargs: Any) -> FNGDPreconditioner:
    """A preconditioner whose next step is a shared one."""
    preconditioner = attach(net, sharing, **kwargs)
    losses(net, batch(6)).mean().backward()
    preconditioner.step()
    net.zero_grad()
    return preconditioner


def kept(preconditioner: FNGDPreconditioner) -> Tensor:
    """The mean over the layers of the weights that the policy keeps ``[N]``."""
    return preconditioner.policy.row.mean(0)


def reasons(preconditioner: FNGDPreconditioner, name: str = TABLE) -> str:
    return preconditioner.coverage().plain[name]
