"""``muon``: orthogonalized Nesterov momentum (Jordan et al. 2024), scaled to AdamW's step (Liu et al. 2025)."""

import torch
from torch import Tensor

from hf_fngd.distributed.sharded import part, whole
from hf_fngd.updates.base import Update, register_rule

# Root mean square of an orthogonalized update, that of a typical AdamW step (Liu et al. 2025, Sec. 2.2).
_MUON_RMS = 0.2
# The most memory of the matrices that are orthogonalized together: beyond, larger products are no faster.
_MUON_BYTES = 2**28


@register_rule("muon", "momentum_buffer")
def muon_update(update: Update) -> None:
    """``m <- lerp(g, m)``, ``p <- p - 0.2 lr sqrt(max(rows, columns)) orthogonalize(lerp(g, m))``; m has ``momentum``.

    The scale lets one learning rate serve matrices of any shape, and AdamW on the parameters beside them. Matrices of
    equal shapes are orthogonalized together; under FSDP2 every process gathers and orthogonalizes all of them.
    """
    (buffers,), grads, sharded, momentum = update.state, update.grads, update.sharded, update.group["momentum"]
    torch._foreach_lerp_(buffers, grads, 1 - momentum)
    update.decay()
    kinds = [(p.shape, d.dtype, d.device) for p, d in zip(sharded, grads, strict=True)]
    for shape, dtype, device in dict.fromkeys(kinds):
        if not shape.numel():  # a layer without features
            continue
        alike = [place for place, own in enumerate(kinds) if own == (shape, dtype, device)]
        working = _working_dtype(dtype, device)
        some = max(1, _MUON_BYTES // (shape.numel() * working.itemsize))
        for members in (alike[start : start + some] for start in range(0, len(alike), some)):
            parts = torch._foreach_lerp([grads[m] for m in members], [buffers[m] for m in members], momentum)
            directions = [whole(d.to(working), sharded[m]) for d, m in zip(parts, members, strict=True)]
            updates = orthogonalize(torch.stack(directions)).to(dtype).unbind()
            torch._foreach_add_(
                [update.params[m] for m in members],
                [part(u, sharded[m]).to(device) for u, m in zip(updates, members, strict=True)],
                alpha=-update.group["lr"] * _MUON_RMS * max(shape) ** 0.5,
            )


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring the singular values of each matrix ``[B, rows, columns]`` near 1 by Newton-Schulz iterations."""
    x = matrices.to(_working_dtype(matrices.dtype, matrices.device))
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    # First by the largest entry: squares of very small or large gradients leave the range.
    tiny = torch.finfo(x.dtype).tiny
    x = x / x.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=tiny)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=tiny)
    a, b, c = 3.4445, -4.7750, 2.0315  # the quintic of Jordan et al.: brings singular values in (0, 1] to about 1
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def _working_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Bfloat16 where a CUDA device has units for it, which is enough and fastest; elsewhere float32 or float64."""
    if dtype != torch.float64 and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    return torch.promote_types(dtype, torch.float32)
