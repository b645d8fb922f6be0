"""The Gram matrix ``K[n, m] = N <h_n, h_m>`` of one layer (Sec. IV-A), in the symbols of `hf_fngd.weights.algebra`."""

from typing import Literal

import torch
from torch import Tensor

from hf_fngd.weights.algebra import accumulation_dtype

Route = Literal["ghost", "formed"]


def normalize(x: Tensor) -> Tensor:
    """Scale a tensor by a power of two so that its largest entry lies in [0.5, 1), in `accumulation_dtype`.

    Nothing depends on the scale of K, and a power of two is exact: whatever the loss scale, the products that follow
    can neither overflow nor vanish.
    """
    x = x.to(accumulation_dtype(x.dtype))
    if x.numel() == 0:
        return x
    # On a CPU these take a tenth of the time of a norm and an ldexp of x.
    low, high = torch.aminmax(x)
    _, exponent = torch.frexp(torch.maximum(-low, high))
    # In two halves: 2**-exponent itself can overflow where the largest entry is subnormal.
    half = torch.div(exponent, 2, rounding_mode="floor")
    return (x * torch.pow(2.0, (-half).to(x.dtype))).mul_(torch.pow(2.0, (half - exponent).to(x.dtype)))


def cheaper_route(n: int, t: int, i: int, o: int) -> Route:
    """Choose how to form K for N samples, T positions, i and o features, by the number of operations.

    The ghost identity takes ``2 N^2 T^2 (i + o)`` (half of it by symmetry), forming h ``2 N T i o (1 + N/T)``. Measured
    times cross where the two are equal, up to a factor near two: much of the ghost's work runs at memory speed.
    """
    return "ghost" if t * t * (i + o) < 2 * (1 + t / n) * i * o else "formed"


def gram(a: Tensor, g: Tensor, *, bias: bool, memory_budget: int, route: Route | None = None) -> Tensor:
    """K ``[N, N]``, symmetric, in `accumulation_dtype`, of inputs ``[N, T, i]`` and output gradients ``[N, T, o]``.

    With ``bias`` a trained bias belongs to h_n. ``memory_budget`` bounds the temporary memory, in bytes, down to the
    smallest block (one sample's row of the ghost product, one output feature of h). No ``route`` means the cheaper one.
    """
    dtype = accumulation_dtype(a.dtype)
    a, g = a.to(dtype), g.to(dtype)
    n, t, i = a.shape
    if n == 0 or t == 0:
        return a.new_zeros(n, n)
    form = gram_ghost if (route or cheaper_route(n, t, i, g.shape[2])) == "ghost" else gram_formed
    return form(a, g, bias=bias, memory_budget=memory_budget).mul_(n)


def gram_ghost(a: Tensor, g: Tensor, *, bias: bool, memory_budget: int) -> Tensor:
    """K / N by ``sum_{t,s} (a[n,t].a[m,s]) (g[n,t].g[m,s])``; Eq. 12 where T = 1. h is never formed.

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
    return k


def gram_formed(a: Tensor, g: Tensor, *, bias: bool, memory_budget: int) -> Tensor:
    """K / N from h itself, formed a slice of output features at a time in one reused buffer."""
    n, _, i = a.shape
    # In bytes: on a CPU the buffer has to stay in the cache, on an accelerator it has to fill the device.
    preferred = (2 if a.device.type == "cpu" else 256) * 2**20
    width = min(g.shape[2], max(1, min(preferred, memory_budget) // (n * i * a.element_size())))
    buffer = a.new_empty(n, width, i)
    k = a.new_zeros(n, n)
    for features in torch.split(g, width, dim=2):
        h = buffer if features.shape[2] == width else a.new_empty(n, features.shape[2], i)
        torch.bmm(features.transpose(1, 2), a, out=h)
        flat = h.view(n, -1)
        k.addmm_(flat, flat.t())
    if bias:
        sums = g.sum(dim=1)
        k.addmm_(sums, sums.t())
    return k
