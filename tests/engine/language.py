"""A language model with tables, a tied head and one outlier a batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

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
