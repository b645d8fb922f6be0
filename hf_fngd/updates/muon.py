"""``muon``: orthogonalized Nesterov momentum (Jordan et al. 2024), scaled to AdamW's step (Liu et al. 2025)."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hf_fngd.distributed.sharded import is_split_by_first, part, whole
from hf_fngd.updates.base import Update, register_rule
from hf_fngd.updates.orthogonal import STEPS, orthogonalize, working_dtype

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
    orthogonalized_momentum(update, partial(orthogonalize, steps=steps_of(update)), max)


def steps_of(update: Update) -> int:
    """``ns_steps`` of the parameter group, which a state of before it was an argument does not have."""
    return int(update.group.get("ns_steps", STEPS))


def orthogonalized_momentum(
    update: Update,
    orthogonal: Callable[[Tensor], Tensor],
    longer: Callable[[int, int], int],
    apart: Callable[[Tensor], bool] = lambda _: False,
) -> None:
    """The step of `muon_update` with another function in place of `orthogonalize`, of matrices ``[B, rows, columns]``.

    ``longer`` tells of a matrix's rows and columns the longer side of what the function makes orthogonal, and ``apart``
    of a parameter whether under FSDP2 each process's part can be taken for a matrix of its own. So can a part of
    parameters with three dimensions, of which the first one counts matrices.
    """
    (buffers,), grads, momentum = update.state, update.grads, update.group["momentum"]
    torch._foreach_lerp_(buffers, grads, 1 - momentum)
    update.decay()
    # The tensors that parts belong to, and the shapes that are orthogonalized.
    own = [apart(like) if like.dim() < 3 else is_split_by_first(like) for like in update.sharded]
    sharded = [p if is_own else like for p, like, is_own in zip(update.params, update.sharded, own, strict=True)]
    counts = [len(p) if p.dim() == 3 else count for p, count in zip(sharded, update.stacked, strict=True)]
    kinds = [(p.shape, count, d.dtype, d.device) for p, count, d in zip(sharded, counts, grads, strict=True)]
    for shape, count, dtype, device in dict.fromkeys(kinds):
        if not shape.numel():  # a layer without features
            continue
        columns = shape[-1]
        rows = shape.numel() // (count * columns)
        alike = [place for place, of in enumerate(kinds) if of == (shape, count, dtype, device)]
        working = working_dtype(dtype, device)
        some = max(1, _MUON_BYTES // (shape.numel() * working.itemsize))
        for members in (alike[start : start + some] for start in range(0, len(alike), some)):
            parts = torch._foreach_lerp([grads[m] for m in members], [buffers[m] for m in members], momentum)
            directions = [whole(d.to(working), sharded[m]) for d, m in zip(parts, members, strict=True)]
            matrices = torch.stack(directions).view(-1, rows, columns)
            updates = orthogonal(matrices).to(dtype).reshape(-1, *shape).unbind()
            torch._foreach_add_(
                [update.params[m] for m in members],
                [part(u, sharded[m]).to(device) for u, m in zip(updates, members, strict=True)],
                alpha=-update.group["lr"] * _MUON_RMS * longer(rows, columns) ** 0.5,
            )
