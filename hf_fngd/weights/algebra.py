"""The algebra of per-sample gradients in one layer. Pure functions that never form the per-sample gradients.

Canonical layout, relied on everywhere in this package:

* ``a[n, t, i]``: the layer's inputs; ``g[n, t, o]``: the loss gradients at its outputs,
  for N samples ``n``, T positions ``t`` that share the layer's weight, ``i`` input and ``o`` output features;
* ``h_n = sum_t g[n, t, :] a[n, t, :]^T`` ``[o, i]``: sample n's share of the batch gradient, so that
  ``sum_n h_n = dL/dW`` (Eq. 10 and 13). A bias belongs to its layer: it appends the column ``sum_t g[n, t, :]``;
* ``w[n]``: the sample weights, dimensionless; None stands for ones.

What runs for each layer reads sizes by ``shape[0]``, and adds a dimension by ``unsqueeze``: ``len`` of a tensor and
indexing by None take several times as long.

Equations and sections are those of arXiv 2403.03473.
"""

import torch
from torch import Tensor

# On the CPU, for operands on any device; ONE takes the dtype of what it meets.
ONE = torch.ones((), dtype=torch.float32, device="cpu")
_TINY = {
    dtype: torch.full((), torch.finfo(dtype).tiny, dtype=dtype, device="cpu")
    for dtype in (torch.float32, torch.float64)
}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms and Gram matrices: float64 for float64 models, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widest_dtype(device: torch.device) -> torch.dtype:
    """float64, and float32 on a device that has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def weighted_factors(a: Tensor, g: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return a ``[N T, i]`` and g ``[N T, o]``, of one dtype, the narrower with its rows times the sample weights.

    Then ``g^T a`` is ``sum_n w_n h_n`` ``[o, i]`` (Sec. IV-C), by the one matrix product that SGD does anyway.
    """
    if w is None:
        return a, g
    return (scaled(a, w), g) if a.shape[1] < g.shape[1] else (a, scaled(g, w))


def weighted_bias_sum(g: Tensor, w: Tensor | None) -> Tensor:
    """The bias column ``[o]`` of ``sum_n w_n h_n``, from g ``[N T, o]``."""
    if w is None:
        return g.sum(dim=0)
    samples, rows = w.shape[0], g.shape[0]
    w = w.to(g.dtype)
    # In one product: half precision would round the sums over the samples or over the positions.
    return torch.mv(g.t(), w if samples == rows else w.unsqueeze(1).expand(-1, rows // samples).reshape(rows))


def tensor_norms(x: Tensor) -> Tensor:
    """The 2-norm of each sample's part of a tensor ``[N, ...]``, shape ``[N]``, in `accumulation_dtype`."""
    rows = x if x.dim() == 2 else x.flatten(1) if x.dim() > 1 else x[:, None]
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=accumulation_dtype(x.dtype))
    return norms


def scaled(x: Tensor, w: Tensor | None) -> Tensor:
    """A tensor ``[N, ...]``, or rows ``[N T, f]``, with each sample's part times its sample weight."""
    if w is None:
        return x
    samples, w = w.shape[0], w.to(x.dtype)
    if samples == x.shape[0]:
        return x * w.view(-1, *[1] * (x.dim() - 1))
    return (x.reshape(samples, x.shape[0] // samples, *x.shape[1:]) * w.view(-1, 1, 1)).view(x.shape)


def mean_norm(norms: Tensor) -> Tensor:
    """The mean of norms ``[N]`` that are not 0, a scalar; NaN where all of them are."""
    count: Tensor = torch.linalg.vector_norm(norms, 0)  # in one kernel
    return norms.sum() / count


def clip(norms: Tensor, bound: Tensor) -> Tensor:
    """Sample weights ``[N]`` that bring norms ``[N]`` above a bound down to it, in `accumulation_dtype`.

    They are ones where all norms are 0. A norm that is NaN or infinite has the sample weight NaN.
    """
    # A bound that is 0 is the mean of the smallest numbers there are.
    return (torch.fmax(bound, _TINY[norms.dtype]) / norms).clamp_(max=1)
