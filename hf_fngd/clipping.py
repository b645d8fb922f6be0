"""Samples brought down to the mean norm of their batch: the weights for it, and the same for one tensor's gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_fngd.persample import accumulation_dtype


def clip_samples(x: Tensor) -> Tensor:
    """Hand on a tensor and clip its gradient in backward, sample by sample, at the mean norm of the batch.

    For the logits, before the loss is computed from them: there one weight a sample reaches all of the model, also what
    FNGD leaves plain (norms, positions), under any optimizer. It knows the sizes of the losses and nothing of those of
    the inputs, which the weights of ``sharing="clipped"`` know layer by layer; both together cost neither anything.
    Scaling the loss changes no weight; a batch with a gradient that is not finite has none that is. With several
    processes, or in accumulation, the mean is that of a micro-batch.

    Args:
        x: a tensor ``[N, ...]``, the first dimension of which is the sample.

    Returns:
        The same values.

    Raises:
        ValueError: the tensor is a scalar.
    """
    if x.dim() == 0:
        raise ValueError(
            "clip_samples takes a tensor whose first dimension is the sample, as the logits, and got a scalar: call "
            "it before the loss is averaged"
        )
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x
    output: Tensor = _Clipping.apply(x)  # type: ignore[no-untyped-call]
    return output


class _Clipping(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        rows = g.flatten(1) if g.dim() > 1 else g[:, None]
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=accumulation_dtype(g.dtype))
        w = clip(norms, mean_norm(norms))
        return g * w.to(g.dtype).view(-1, *[1] * (g.dim() - 1))


def mean_norm(norms: Tensor) -> Tensor:
    """The mean of norms ``[..., N]`` that are not 0, ``[...]``; NaN where all of them are."""
    return norms.sum(dim=-1) / norms.count_nonzero(dim=-1)


def clip(norms: Tensor, bound: Tensor) -> Tensor:
    """Weights ``[N]`` that bring norms ``[N]`` above a bound down to it; ones where the bound is NaN as all are 0."""
    return torch.where(norms > 0, bound / torch.maximum(norms, bound), 1)
