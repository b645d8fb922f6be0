"""``muon``: orthogonalized Nesterov momentum (Jordan et al. 2024), scaled to AdamW's step (Liu et al. 2025)."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hf_fngd.distributed.owners import Kind, by_kind, exchanges
from hf_fngd.distributed.sharded import is_sharded, is_split_by_first
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
    equal shapes are orthogonalized together; under FSDP2 each matrix by one process.
    """
    orthogonalized_momentum(update, partial(orthogonalize, steps=steps_of(update)), lambda rows: rows)


def steps_of(update: Update) -> int:
    """``ns_steps`` of the parameter group, which a state of before it was an argument does not have."""
    return int(update.group.get("ns_steps", STEPS))


def orthogonalized_momentum(
    update: Update,
    orthogonal: Callable[[Tensor], Tensor],
    height: Callable[[int], int],
    apart: Callable[[Tensor, int], bool] = lambda *_: False,
) -> None:
    """The step of `muon_update` with another function in place of `orthogonalize`, of matrices ``[B, rows, columns]``.

    ``height`` tells of a matrix's rows how many the function makes orthogonal at a time, and ``apart`` of a parameter
    that consists of so many matrices whether under FSDP2 each process's part can be taken for a matrix of its own.
    Where the first dimension counts the matrices, a part consists of some of them.
    """
    (buffers,), grads, momentum = update.state, update.grads, update.group["momentum"]
    torch._foreach_lerp_(buffers, grads, 1 - momentum)
    update.decay()
    tensors, kinds = [], {}  # what parts belong to
    for place, (p, like, d) in enumerate(zip(update.params, update.sharded, grads, strict=True)):
        count, columns = update.matrices[place]
        if is_sharded(like):
            if count == like.shape[0] and is_split_by_first(like):
                like, count = p, p.shape[0]
            elif apart(like, count):
                like, count = p, 1
        tensors.append(like)
        if like.numel():  # not so in a layer without features
            kinds[place] = Kind(like.shape, count, columns, d.dtype, d.device, working_dtype(d.dtype, d.device))

    def sides(kind: Kind) -> tuple[int, int]:
        return height(kind.rows), kind.columns

    # Orthogonalizing takes operations in proportion.
    for exchange in exchanges(tensors, kinds, lambda kind: kind.shape.numel() * min(sides(kind)), _MUON_BYTES):
        members = exchange.members
        directions = torch._foreach_lerp([grads[m] for m in members], [buffers[m] for m in members], momentum)
        wholes = exchange.collect({m: d.to(kinds[m].working) for m, d in zip(members, directions, strict=True)})
        updates: dict[int, Tensor] = {}
        for kind, alike in by_kind(exchange.mine, kinds).items():
            batch = torch.stack([wholes[m] for m in alike]).reshape(-1, kind.rows, kind.columns)
            found = orthogonal(batch).to(exchange.dtype or kind.dtype).reshape(-1, *kind.shape)
            updates.update(zip(alike, found.unbind(), strict=True))
        parts = exchange.give_back(updates)
        for kind, alike in by_kind(members, kinds).items():
            torch._foreach_add_(
                [update.params[m] for m in alike],
                [parts[m].to(kind.device, kind.dtype) for m in alike],
                alpha=-update.group["lr"] * _MUON_RMS * max(sides(kind)) ** 0.5,
            )
