"""clip_samples: each sample's gradient at one tensor, brought down to the mean norm of its batch."""

from typing import Any

import torch
from torch import Tensor

from hf_fngd.weights.algebra import clip, mean_norm, scaled, tensor_norms


def clip_samples(x: Tensor) -> Tensor:
    """Clip the gradient of a tensor ``[N, ...]`` in backward, sample by sample, at the mean norm of its batch.

    Take the logits, before the loss: there one sample weight reaches the whole model, also what FNGD leaves plain,
    under any optimizer. It sees the sizes of the losses, but not those of the inputs, which ``sharing="clipped"`` sees
    layer by layer. The batch is one process's micro-batch; scaling the loss changes no sample weight. A gradient that
    is not finite makes all others NaN, except those that are 0.

    Returns the tensor itself; in a graph of torch.compile a copy. Raises TypeError for what is no tensor, and
    ValueError for a scalar.
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
        return _Clipping.apply(x)  # type: ignore[no-untyped-call, no-any-return]
    # A hook, since a model may change x in place, but not the output of a Function.
    x.register_hook(_clipped)  # type: ignore[no-untyped-call]
    return x


def _clipped(g: Tensor) -> Tensor:
    with torch.no_grad():  # sample weights are constants of a second derivative
        norms = tensor_norms(g)
        w = clip(norms, mean_norm(norms))
    return scaled(g, w)


class _Clipping(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return _clipped(g)
