"""``muon``: orthogonalized Nesterov momentum (Jordan et al. 2024), scaled to AdamW's step (Liu et al. 2025)."""

import torch
from torch import Tensor

from hf_fngd.distributed.sharded import part, whole
from hf_fngd.updates.base import Update, register_rule

# Root mean square of an orthogonalized update, that of a typical AdamW step (Liu et al. 2025, Sec. 2.2).
_MUON_RMS = 0.2
# The most memory of the matrices that are orthogonalized together: beyond, larger products are no faster.
_MUON_BYTES = 2**28
_STEPS = 5
# The quintic polynomial of Jordan et al.: brings singular values in (0, 1] to about 1.
_A, _B, _C = 3.4445, -4.7750, 2.0315


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
    """Bring the singular values of each matrix ``[B, rows, columns]`` near 1 by Newton-Schulz iterations.

    With X wide, ``X <- (A + B G + C G^2) X`` where ``G = X X^T``, five times.
    """
    x = matrices.to(_working_dtype(matrices.dtype, matrices.device))
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    # First by the largest entry: squares of very small or large gradients leave the range.
    tiny = torch.finfo(x.dtype).tiny
    x = x / x.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=tiny)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=tiny)
    x = (_on_gram_matrices if prefers_gram(x.shape[-2], x.shape[-1], x.dtype) else _on_matrices)(x)
    return x.mT if tall else x


def prefers_gram(rows: int, columns: int, dtype: torch.dtype) -> bool:
    """Whether iterating on Gram matrices is the faster way, for a wide matrix with r rows and c columns.

    It takes ``4 r^2 c + 34 r^3`` operations, iterating on the matrix ``5 (4 r^2 c + 2 r^3)``: fewer from c = 1.5 r on,
    and half the time at 4 r (on a CPU). Half precision does not hold what the iteration makes of a Gram matrix's
    rounding; float32 has errors of 1e-3 at most.
    """
    return columns >= 2 * rows and dtype in (torch.float32, torch.float64)


def _on_matrices(x: Tensor) -> Tensor:
    for _ in range(_STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        x = torch.baddbmm(x, polynomial, x, beta=_A)
    return x


def _on_gram_matrices(x: Tensor) -> Tensor:
    """The product of the polynomials first, and with X in the end: G becomes ``P G P``, as X becomes ``P X``."""
    gram = x @ x.mT
    product = polynomial = _polynomial(gram)
    for _ in range(_STEPS - 1):
        gram = polynomial @ gram @ polynomial
        polynomial = _polynomial(gram)
        product = polynomial @ product
    return product @ x


def _polynomial(gram: Tensor) -> Tensor:
    found = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
    found.diagonal(dim1=-2, dim2=-1).add_(_A)
    return found


def _working_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Bfloat16 where a CUDA device has units for it, which is enough and fastest; elsewhere float32 or float64."""
    if dtype != torch.float64 and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    return torch.promote_types(dtype, torch.float32)
