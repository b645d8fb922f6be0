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


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms and Gram matrices: float64 for float64 models, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def weighted_sum(a: Tensor, g: Tensor, w: Tensor | None) -> Tensor:
    """``sum_n w_n h_n`` ``[o, i]`` (Sec. IV-C), by the one matrix product that SGD does anyway.

    a is ``[N T, i]``, g ``[N T, o]``, and w ``[N]`` or `of_positions`, of one dtype.
    """
    if w is not None and a.shape[1] < g.shape[1]:  # the weights go to the narrower factor
        a = _scaled_rows(a, w)
    elif w is not None:
        g = _scaled_rows(g, w)
    return torch.mm(g.t(), a)


def weighted_bias_sum(g: Tensor, w: Tensor | None) -> Tensor:
    """The bias column of `weighted_sum`, ``[o]``."""
    if w is None:
        return g.sum(dim=0)
    # In one product: half precision would round the sums over the samples or over the positions.
    return torch.mv(g.t(), of_positions(w, g.shape[0]))


def of_positions(w: Tensor, rows: int) -> Tensor:
    """Sample weights ``[N]`` for each of T positions, ``[N T]``; those of as many rows as they are."""
    samples = w.shape[0]
    return w if samples == rows else w.unsqueeze(1).expand(-1, rows // max(1, samples)).reshape(rows)


def _scaled_rows(rows: Tensor, w: Tensor) -> Tensor:
    """Rows ``[N T, f]``, T of them a sample, times its sample weight."""
    return rows * of_positions(w, rows.shape[0]).unsqueeze(1)


def tensor_norms(x: Tensor) -> Tensor:
    """The 2-norm of each sample's part of a tensor ``[N, ...]``, shape ``[N]``, in `accumulation_dtype`."""
    rows = x if x.dim() == 2 else x.flatten(1) if x.dim() > 1 else x[:, None]
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=accumulation_dtype(x.dtype))
    return norms


def scaled(x: Tensor, w: Tensor | None) -> Tensor:
    """A tensor ``[N, ...]`` with each sample's part times its sample weight."""
    return x if w is None else x * w.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def mean_norm(norms: Tensor) -> Tensor:
    """The mean of norms ``[N]`` that are not 0, a scalar; NaN where all of them are."""
    count: Tensor = torch.linalg.vector_norm(norms, 0)  # in one kernel
    return norms.sum() / count


def clip(norms: Tensor, bound: Tensor) -> Tensor:
    """Sample weights ``[N]`` that bring norms ``[N]`` above a bound down to it; ones where the bound is NaN."""
    bound = bound.nan_to_num(nan=1.0, posinf=torch.inf)
    # A mean of the smallest numbers there are is 0.
    return bound / torch.maximum(norms, bound).clamp_(min=torch.finfo(norms.dtype).tiny)
