"""The Gram matrix of one layer's per-sample gradients, ``K[n, m] = N <h_n, h_m>`` (Sec. IV-A). Pure functions.

Layout and symbols as in `hf_fngd.weights.algebra`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hf_fngd.weights.algebra import accumulation_dtype

Route = Literal["ghost", "formed"]

# Best size of the slice buffer of `gram_formed`: on a CPU it has to stay in the cache, on an accelerator it
# has to be large enough to fill the device.
_CPU_SLICE_BYTES = 2 * 2**20
_ACCELERATOR_SLICE_BYTES = 256 * 2**20


def normalize(x: Tensor) -> Tensor:
    """Scale a tensor by a power of two so that its largest entry lies in [0.5, 1).

    The result is in `accumulation_dtype`. The sample weights and the noise ratio do not depend on the scale of K, and a
    power of two is exact: the products that follow can neither overflow nor vanish, whatever the loss scale.
    """
    x = x.to(accumulation_dtype(x.dtype))
    if x.numel() == 0:
        return x
    # These, rather than a norm and ldexp of x, are a tenth of the time on a CPU.
    low, high = torch.aminmax(x)
    _, exponent = torch.frexp(torch.maximum(-low, high))
    # In two halves: 2**-exponent itself can overflow where the largest entry is subnormal.
    half = torch.div(exponent, 2, rounding_mode="floor")
    return (x * torch.pow(2.0, (-half).to(x.dtype))).mul_(torch.pow(2.0, (half - exponent).to(x.dtype)))


def cheaper_route(n: int, t: int, i: int, o: int) -> Route:
    """Choose how to form K for N samples, T positions, i and o features.

    By operations the ghost identity costs ``2 N^2 T^2 (i + o)`` (half of it by symmetry) and forming h costs
    ``2 N T i o (1 + N/T)``; measured times cross where the two are equal up to a factor near two, since the
    ghost's elementwise product and reduction run at memory speed.
    """
    return "ghost" if t * t * (i + o) < 2 * (1 + t / n) * i * o else "formed"


def gram(a: Tensor, g: Tensor, *, bias: bool, memory_budget: int, route: Route | None = None) -> Tensor:
    """The Gram matrix K of the per-sample gradients of one layer.

    Args:
        a: inputs ``[N, T, i]``.
        g: output gradients ``[N, T, o]``.
        bias: whether the layer has a trained bias, which then belongs to h_n.
        memory_budget: bound of the temporary memory, in bytes; the smallest block (one sample's row of the
            ghost product, one output feature of h) is used where the budget is below it.
        route: "ghost" or "formed"; None chooses the cheaper one.

    Returns:
        K ``[N, N]``, symmetric, in `accumulation_dtype`.
    """
    dtype = accumulation_dtype(a.dtype)
    a, g = a.to(dtype), g.to(dtype)
    n, t, i = a.shape
    o = g.shape[-1]
    if n == 0 or t == 0:
        return a.new_zeros(n, n)
    if (route or cheaper_route(n, t, i, o)) == "ghost":
        return gram_ghost(a, g, bias=bias, memory_budget=memory_budget)
    return gram_formed(a, g, bias=bias, memory_budget=memory_budget)


def gram_ghost(a: Tensor, g: Tensor, *, bias: bool, memory_budget: int) -> Tensor:
    """K by ``N sum_{t,s} (a[n,t].a[m,s]) (g[n,t].g[m,s])``; Eq. 12 where T = 1. h is never formed.

    Works on row blocks of the upper triangle: 1/blocks of the memory and (blocks + 1)/(2 blocks) of the work.
    """
    n, t, _ = a.shape
    affordable = max(1, memory_budget // (2 * n * t * t * a.element_size()))
    # Four blocks do 5/8 of the work of one; more of them win little and make the products small.
    rows = min(affordable, n if t == 1 else max(1, -(-n // 4)))
    k = a.new_empty(n, n)
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        products = a[start:stop].flatten(0, 1) @ a[start:].flatten(0, 1).t()
        if bias:
            products += 1
        products *= g[start:stop].flatten(0, 1) @ g[start:].flatten(0, 1).t()
        block = products if t == 1 else products.view(stop - start, t, n - start, t).sum(dim=(1, 3))
        k[start:stop, start:] = block
        k[start:, start:stop] = block.t()
    return k.mul_(n)


def gram_formed(a: Tensor, g: Tensor, *, bias: bool, memory_budget: int) -> Tensor:
    """K from h itself, formed a slice of output features at a time in one reused buffer."""
    n, _, i = a.shape
    o = g.shape[-1]
    preferred = _CPU_SLICE_BYTES if a.device.type == "cpu" else _ACCELERATOR_SLICE_BYTES
    width = min(o, max(1, min(preferred, memory_budget) // (n * i * a.element_size())))
    buffer = a.new_empty(n, width, i)
    k = a.new_zeros(n, n)
    for start in range(0, o, width):
        stop = min(start + width, o)
        h = buffer if stop - start == width else a.new_empty(n, stop - start, i)
        torch.bmm(g[:, :, start:stop].transpose(1, 2), a, out=h)
        flat = h.view(n, -1)
        k.addmm_(flat, flat.t())
    if bias:
        sums = g.sum(dim=1)
        k.addmm_(sums, sums.t())
    return k.mul_(n)
