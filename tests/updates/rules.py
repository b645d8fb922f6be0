"""Update rules on tensors alone: steps of ours and of torch's, and what quintic iterations make of a matrix."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_fngd.updates import RULES, Update

SHAPES = [(4, 6), (6, 4), (5,), (4, 6), (3, 3)]
MATRICES = [(4, 6), (6, 4), (4, 6), (3, 3), (1, 5)]
STEPS = 20
SETTINGS = {"lr": 0.05, "momentum": 0.9, "beta2": 0.98, "eps": 1e-7, "weight_decay": 0.1, "block_size": 3}


def start(shapes: list[tuple[int, ...]], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def gradients(shapes: list[tuple[int, ...]], step: int) -> list[Tensor]:
    return start(shapes, seed=100 + step)


def apply(rule: str, params: list[Tensor], grads: list[Tensor], steps: list[int], *state: list[Tensor], **changes: Any):
    """Update in place; returns the state, new where none is given."""
    kept = state or tuple([torch.zeros_like(p) for p in params] for _ in RULES[rule].state)
    matrices = [(1, p.shape[-1]) for p in params]
    RULES[rule].update(Update(params, grads, kept, steps, params, matrices, SETTINGS | changes))
    return kept


def ours(rule: str, shapes: list[tuple[int, ...]], **changes: Any) -> list[Tensor]:
    params, state = start(shapes), ()
    for step in range(STEPS):
        state = apply(rule, params, gradients(shapes, step), [step + 1] * len(params), *state, **changes)
    return params


def theirs(make: Callable[[list[Tensor]], torch.optim.Optimizer], shapes: list[tuple[int, ...]]) -> list[Tensor]:
    params = [p.requires_grad_() for p in start(shapes)]
    optimizer = make(params)
    for step in range(STEPS):
        for p, g in zip(params, gradients(shapes, step), strict=True):
            p.grad = g
        optimizer.step()
    return [p.detach() for p in params]


assert_equal = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-12)


def polynomial(matrix: Tensor, steps: int = 5) -> Tensor:
    """What quintic iterations make of the singular values, those of a matrix of unit Frobenius norm."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vh
