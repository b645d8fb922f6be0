"""Per-sample gradient algebra of one layer, without forming per-sample gradients where that is cheaper.

Canonical layout, relied on everywhere below:

* ``a[n, t, i]``: the layer's inputs; ``g[n, t, o]``: the loss gradients at its outputs,
  for N samples ``n``, T positions ``t`` that share the weight, ``i`` input and ``o`` output features;
* ``h_n = sum_t g[n, t, :] a[n, t, :]^T`` ``[o, i]``: sample n's share of the batch gradient, so that
  ``sum_n h_n = dL/dW`` (Eq. 10 and 13). A bias belongs to its layer: it appends the column ``sum_t g[n, t, :]``;
* ``K[n, m] = N <h_n, h_m>`` ``[N, N]``: the Gram matrix (Sec. IV-A).

Equations and sections are those of arXiv 2403.03473. All functions are pure.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Route = Literal["ghost", "formed"]

# Best size of the slice buffer of `gram_formed`: on a CPU it has to stay in the cache, on an accelerator it
# has to be large enough to fill the device.
_CPU_SLICE_BYTES = 2 * 2**20
_ACCELERATOR_SLICE_BYTES = 256 * 2**20


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which Gram matrices are formed: float64 for float64 models, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalize(x: Tensor) -> Tensor:
    """Scale a tensor by a power of two so that its largest entry lies in [0.5, 1).

    The weights and the noise ratio do not depend on the scale of K, and a power of two is exact: the products
    that follow can neither overflow nor vanish, whatever the loss scale. Non-finite input stays non-finite.

    Args:
        x: any tensor.

    Returns:
        The scaled tensor, in `accumulation_dtype`.
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


def weighted_sum(a: Tensor, g: Tensor, w: Tensor | None) -> Tensor:
    """The weighted sum of the per-sample gradients, ``sum_n w_n h_n`` (Sec. IV-C), in one matrix product.

    The weights go to whichever factor is narrower; the product is the one that SGD does anyway.

    Args:
        a: inputs ``[N, T, i]``.
        g: output gradients ``[N, T, o]``, of a's dtype.
        w: weights ``[N]``, or None for ones (the plain gradient, at no extra cost).

    Returns:
        ``[o, i]``, in a's dtype.
    """
    if w is not None:
        scale = w.to(a.dtype)[:, None, None]
        if a.shape[-1] <= g.shape[-1]:
            a = a * scale
        else:
            g = g * scale
    return g.flatten(0, 1).t() @ a.flatten(0, 1)


def weighted_bias_sum(g: Tensor, w: Tensor | None) -> Tensor:
    """The bias column of `weighted_sum`: ``sum_n w_n sum_t g[n, t, :]``, shape ``[o]``.

    A matrix-vector product: the reduction that SGD does anyway, without the per-sample sums in between.
    """
    flat = g.flatten(0, 1)
    if w is None:
        return flat.sum(dim=0)
    return torch.mv(flat.t(), w.to(g.dtype)[:, None].expand(g.shape[:2]).reshape(-1))


def sample_norms(a: Tensor, g: Tensor, *, bias: bool) -> Tensor:
    """The cheap proxy ``||a_n||_F ||g_n||_F`` of ``||h_n||``, shape ``[N]``; equal to it where T = 1.

    Inputs count at positions without a gradient (padding) too.

    Args:
        a: inputs ``[N, T, i]``.
        g: output gradients ``[N, T, o]``.
        bias: whether the layer has a trained bias, which makes a column of ones of ``a``'s.
    """
    dtype = accumulation_dtype(a.dtype)
    norm_a: Tensor = torch.linalg.vector_norm(a, dim=(1, 2), dtype=dtype)
    if bias:
        norm_a = torch.hypot(norm_a, norm_a.new_full((), a.shape[1] ** 0.5))
    norm_g: Tensor = torch.linalg.vector_norm(g, dim=(1, 2), dtype=dtype)
    return norm_a * norm_g


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
    Arguments and result as in `gram`, with ``a`` and ``g`` of one dtype.
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
    """K from h itself, formed a slice of output features at a time in one reused buffer.

    Arguments and result as in `gram`, with ``a`` and ``g`` of one dtype.
    """
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
