"""clip_samples: each sample's gradient at one tensor, brought down to the mean norm of its batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_fngd.weights.algebra import clip, mean_norm, scaled, tensor_norms


def clip_samples(x: Tensor) -> Tensor:
    """Clip the gradient of a tensor in backward, sample by sample, at the mean norm of the batch.

    For the logits, before the loss is computed from them: there one sample weight reaches all of the model, also what
    FNGD leaves plain, under any optimizer. It knows the sizes of the losses and nothing of those of the inputs, which
    the sample weights of ``sharing="clipped"`` know layer by layer. The batch is the micro-batch at hand, of one
    process; scaling the loss changes no sample weight. A gradient that is not finite makes all others NaN, but those
    that are 0.

    Args:
        x: a tensor ``[N, ...]``, the first dimension of which is the sample.

    Returns:
        The tensor itself; in a graph of torch.compile a copy.

    Raises:
        TypeError: it is no tensor.
        ValueError: it is a scalar.
    """
    if not isinstance(x, Tensor):
        raise TypeError(
            f"clip_samples takes a tensor, as the logits, and got {type(x).__name__}: take the tensor out of a model's "
            "output (.logits), or register the hook on the head (model.lm_head, model.classifier)"
        )
    if x.dim() == 0:
        raise ValueError(
            "clip_samples takes a tensor whose first dimension is the sample, as the logits, and got a scalar: call "
            "it before the loss is averaged"
        )
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x
    if torch.compiler.is_compiling():
        copy: Tensor = _Clipping.apply(x)  # type: ignore[no-untyped-call]
        return copy
    x.register_hook(_clipped)  # type: ignore[no-untyped-call]  # which a model may change in place, unlike the output of a Function
    return x


def _clipped(g: Tensor) -> Tensor:
    norms = tensor_norms(g)
    return scaled(g, clip(norms, mean_norm(norms)))


class _Clipping(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return _clipped(g)
