"""clip_samples: each sample's gradient at one tensor, brought down to the mean norm of its batch."""

import functools
from typing import Any

import torch
from torch import Tensor

from hf_fngd.samples.rows import Labeled
from hf_fngd.weights.algebra import clip, mean_norm, scaled, tensor_norms


def clip_samples(x: Tensor, sample_ids: Tensor | None = None) -> Tensor:
    """Clip the gradient of a tensor ``[N, ...]`` in backward, sample by sample, at the mean norm of its batch.

    Use it on the logits, before the loss. There one sample weight reaches the whole model, under any optimizer, what
    FNGD leaves plain included. It sees how large the losses are, but not how large the inputs are;
    ``sharing="clipped"`` sees both, layer by layer. The batch is one process's micro-batch. Scaling the loss changes no
    sample weight. A gradient that is not finite, or too large to be squared, becomes NaN.

    Args:
        x: the tensor.
        sample_ids: which sample each row belongs to, if a row is not a sample: integers in the shape of the first
            dimensions of ``x``, ``[B T]`` for flattened logits ``[B T, V]``, ``[B, T]`` for packed sequences
            ``[B, T, V]``. Rows with equal ids are one sample. The host waits for the device.

    Returns:
        The tensor itself; in a compiled graph a copy.

    Raises:
        TypeError: ``x`` is no tensor, or the ids are no integers.
        ValueError: ``x`` is a scalar, or the ids have another shape.
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
    if sample_ids is not None:
        if not isinstance(sample_ids, Tensor) or sample_ids.is_floating_point() or sample_ids.is_complex():
            raise TypeError("sample_ids takes a tensor of integers, one for each row: which sample the row belongs to")
        if sample_ids.dim() == 0 or sample_ids.shape != x.shape[: sample_ids.dim()]:
            raise ValueError(
                f"sample_ids has the shape {tuple(sample_ids.shape)}, which is not that of the first dimensions of a "
                f"tensor of the shape {tuple(x.shape)}: give one for each of its rows"
            )
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x
    places = None if sample_ids is None else torch.unique(sample_ids, return_inverse=True)[1].to(x.device)
    if torch.compiler.is_compiling():
        return _Clipping.apply(x, places)  # type: ignore[no-untyped-call, no-any-return]
    # A hook, since a model may change x in place, but not the output of a Function.
    x.register_hook(functools.partial(_clipped, places))  # type: ignore[no-untyped-call]
    return x


def _clipped(places: Tensor | None, g: Tensor) -> Tensor:
    with torch.no_grad():  # sample weights are constants of a second derivative
        rows = g if places is None else g.flatten(0, places.dim() - 1)
        norms, labeled = tensor_norms(rows), None if places is None else Labeled(0, places.flatten())
        if labeled is not None:  # as many as there are rows; behind the samples' there are zeros
            norms = labeled.of_samples(norms, len(rows), adds=False)
        w = clip(norms, mean_norm(norms))
        w = w if labeled is None else labeled.of_rows(w, len(rows))
    return scaled(rows, w).view(g.shape)


class _Clipping(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor | None) -> Tensor:
        ctx.save_for_backward(places)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return _clipped(places, g), None
