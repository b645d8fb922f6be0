"""Policies as the engine uses them, and what it puts into them."""

import torch
from torch import Tensor

from hf_fngd.sharing import BatchInfo, SharingPolicy, make_policy

L = 3


def weights(seed: int, size: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    """Weights as a coefficient step yields them: mean 1, now and then negative."""
    w = torch.randn(L, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (1 + 0.8 * (w - w.mean(dim=1, keepdim=True))).to(dtype)


def norms(seed: int, size: int = 8) -> Tensor:
    return torch.rand(L, size, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64)


def prepared(sharing: str | SharingPolicy, steps: int = 20, budget: int = 2**20) -> SharingPolicy:
    policy = make_policy(sharing)
    policy.prepare(L, steps, budget)
    return policy


def info(size: int = 8, place: int = 0, first: int = 0) -> BatchInfo:
    return BatchInfo(size, place, torch.arange(first, first + size))


def commit(policy: SharingPolicy, w: Tensor, n: Tensor, batch: BatchInfo, valid: Tensor | None = None) -> None:
    """A coefficient step's side of the engine."""
    encoded = torch.stack([policy.encode(w[layer], n[layer]) for layer in range(L)])
    policy.commit(encoded, torch.ones(L, dtype=torch.bool) if valid is None else valid, batch)


def fetch(policy: SharingPolicy, n: Tensor, batch: BatchInfo) -> Tensor | None:
    """A shared step's side of the engine."""
    stored = policy.lookup(batch)
    if stored is None:
        return None
    assert stored.shape == (L, batch.size)
    return torch.stack([policy.decode(stored[layer], n[layer]) for layer in range(L)])


def store_tensors(policy: SharingPolicy) -> list[Tensor]:
    return [value for value in vars(policy).values() if isinstance(value, Tensor)]
