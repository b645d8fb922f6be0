"""Policies as the engine uses them, on samples that are given by their gradients."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_fngd.weights.base import SharingPolicy, policy_class
from tests.reference import Dense

L, DAMPING = 3, 0.05


@dataclass
class Given:
    """The samples of one call of a layer: their gradients ``[P, N]``."""

    u: Tensor

    def norms(self) -> Tensor:
        return self.u.norm(dim=0)

    def gram(self, memory_budget: int) -> Tensor:
        return self.u.t() @ self.u

    def solved(self) -> Tensor:
        """The solution of Eq. 9, by the oracle."""
        return Dense(self.u.double(), DAMPING).w


def samples(seed: int, size: int = 8, dtype: torch.dtype = torch.float64) -> list[Given]:
    """Those of L layers, with something in common."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(12, size + 1, generator=generator, dtype=torch.float64) for _ in range(L)]
    return [Given((u[:, :1] + u[:, 1:]).to(dtype)) for u in made]


def of_norms(*norms: Sequence[float]) -> list[Given | None]:
    """A micro-batch of samples with these norms, layer by layer; a layer without any is not reached."""
    return [Given(torch.tensor([list(of)], dtype=torch.float64)) if of else None for of in norms]


def prepared(sharing: str | SharingPolicy, layers: int = L, **changes: Any) -> SharingPolicy:
    policy = sharing if isinstance(sharing, SharingPolicy) else policy_class(sharing)()
    policy.prepare(layers, **{"damping": DAMPING, "coefficient_steps": None, "memory_budget": 2**20} | changes)
    return policy


def step(policy: SharingPolicy, *batches: Sequence[Given | None]) -> list[Tensor]:
    """An optimizer step; the sample weights ``[L, N]`` of its micro-batches."""
    opened, found = [], []
    for offset, layers in enumerate(batches):
        reached = next(of.u for of in layers if of is not None)
        opened.append(policy.begin(reached.shape[1], offset))
        weights = [None if of is None else opened[-1].weigh(place, of) for place, of in enumerate(layers)]
        found.append(torch.stack([reached.new_ones(reached.shape[1]) if w is None else w for w in weights]))
    policy.close(opened, len(opened), reached.new_empty(0))
    return found
