"""A small model whose layers have names as an encoder's do, and what its parameter groups say."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_fngd import FNGD


class Deep(nn.Module):
    """An embedding, two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.layer = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(6, 6), "norm": nn.LayerNorm(6)}) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x).mean(1)
        for block in self.layer:
            x = x + block["norm"](torch.tanh(block["fc"](x)))
        return self.head(x)


def deep() -> Deep:
    torch.manual_seed(0)
    return Deep().double()


def rates(optimizer: FNGD, key: str = "lr") -> dict[str, Any]:
    return {name: group[key] for group in optimizer.param_groups for name in group["param_names"]}
