"""``muon``: orthogonalized Nesterov momentum (Jordan et al. 2024), scaled to AdamW's step (Liu et al. 2025)."""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_fngd.distributed.sharded import part, whole
from hf_fngd.updates.base import Update, register_rule
from hf_fngd.updates.orthogonal import orthogonalize, working_dtype

# Root mean square of an orthogonalized update, that of a typical AdamW step (Liu et al. 2025, Sec. 2.2).
_MUON_RMS = 0.2
# The most memory of the matrices that are orthogonalized together: beyond, larger products are no faster.
_MUON_BYTES = 2**28


@register_rule("muon", "momentum_buffer", matrices=True)
def muon_update(update: Update) -> None:
    """``m <- lerp(g, m)``, ``p <- p - 0.2 lr sqrt(max(rows, columns)) orthogonalize(lerp(g, m))``; m has ``momentum``.

    The scale lets one learning rate serve matrices of any shape, and AdamW on the parameters beside them. Matrices of
    equal shapes are orthogonalized together; under FSDP2 every process gathers and orthogonalizes all of them.
    """
    orthogonalized_momentum(update, orthogonalize, max)


def orthogonalized_momentum(
    update: Update,
    orthogonal: Callable[[Tensor], Tensor],
    longer: Callable[[int, int], int],
    apart: Callable[[Tensor], bool] = lambda _: False,
) -> None:
    """The step of `muon_update` with another function in place of `orthogonalize`, of matrices ``[B, rows, columns]``.

    ``longer`` tells of a matrix's rows and columns the longer side of what the function makes orthogonal, and ``apart``
    of a parameter whether under FSDP2 each process's part can be taken for a matrix of its own.
    """
    (buffers,), grads, momentum = update.state, update.grads, update.group["momentum"]
    torch._foreach_lerp_(buffers, grads, 1 - momentum)
    update.decay()
    # The tensors that parts belong to, and the shapes that are orthogonalized.
    sharded = [p if apart(like) else like for p, like in zip(update.params, update.sharded, strict=True)]
    kinds = [(p.shape, d.dtype, d.device) for p, d in zip(sharded, grads, strict=True)]
    for shape, dtype, device in dict.fromkeys(kinds):
        if not shape.numel():  # a layer without features
            continue
        alike = [place for place, own in enumerate(kinds) if own == (shape, dtype, device)]
        working = working_dtype(dtype, device)
        some = max(1, _MUON_BYTES // (shape.numel() * working.itemsize))
        for members in (alike[start : start + some] for start in range(0, len(alike), some)):
            parts = torch._foreach_lerp([grads[m] for m in members], [buffers[m] for m in members], momentum)
            directions = [whole(d.to(working), sharded[m]) for d, m in zip(parts, members, strict=True)]
            updates = orthogonal(torch.stack(directions)).to(dtype).unbind()
            torch._foreach_add_(
                [update.params[m] for m in members],
                [part(u, sharded[m]).to(device) for u, m in zip(updates, members, strict=True)],
                alpha=-update.group["lr"] * _MUON_RMS * longer(*shape) ** 0.5,
            )
