"""What a step should cost: additions and multiplications, counted from shapes alone. Pure functions.

A layer is ``(o, i)``, its output and input features; there are N samples of T positions each. Multiplying ``[p, q]`` by
``[q, r]`` takes ``2 p q r`` operations, as in torch's FlopCounterMode.

An operation costs the same wherever it is. So these are left out: traffic of memory (what is element by element, as
norms, activations, losses and the updates of SGD and AdamW, counts nothing), the lower rate of small products, the
precision, and the host's time, which decides where a device is fast and a model small.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from hf_fngd.updates.block_muon import block_rows
from hf_fngd.updates.orthogonal import count_operations
from hf_fngd.weights.gram import cheaper_route

Shapes = Iterable[tuple[int, int]]


def forward_and_backward(layers: Shapes, n: int, t: int, attentions: int = 0, width: int = 0) -> float:
    """Three products a layer, and six of ``T x width x T`` a sample and attention (all heads, masks or not)."""
    return sum(6 * n * t * o * i for o, i in layers) + attentions * 12 * n * t * t * width


def weighting(layers: Shapes, n: int, t: int) -> float:
    """What a step with sample weights at hand adds: they multiply the narrower factor of each weight's gradient."""
    return sum(n * t * min(o, i) for o, i in layers)


def clipping(layers: Shapes, n: int, t: int) -> float:
    """What `clipped` adds: the norms of inputs and output gradients, and `weighting`."""
    layers = list(layers)
    return sum(2 * n * t * (o + i) for o, i in layers) + weighting(layers, n, t)


def coefficient_step(layers: Shapes, n: int, t: int) -> float:
    """What a coefficient step adds, as `never` in every step: Gram matrices, their solution and `weighting`."""
    layers = list(layers)
    solution = n**3 / 3 + 2 * n**2
    return sum(gram_matrix(o, i, n, t) + solution for o, i in layers) + weighting(layers, n, t)


def gram_matrix(o: int, i: int, n: int, t: int) -> float:
    """K ``[N, N]`` of one layer, by the cheaper route."""
    if cheaper_route(n, t, i, o) == "formed":
        return 2 * n * t * o * i + 2 * n**2 * o * i
    of_triangle = 1 if t == 1 else 5 / 8  # in four blocks of rows, where the memory budget has room for them
    return of_triangle * 2 * n**2 * t**2 * (o + i)


def block_orthogonalization(
    rows: int, columns: int, size: int | None, positions: int, dtype: torch.dtype, steps: int = 5
) -> float:
    """Muon's iterations on blocks of at most ``size`` rows; None: those of the default at so many positions a step."""
    height = block_rows(rows, columns, size, positions)
    return math.ceil(rows / height) * count_operations(height, columns, steps, dtype)
