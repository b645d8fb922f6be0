"""``muon``: orthogonalized Nesterov momentum (Jordan et al. 2024), scaled to AdamW's step (Liu et al. 2025)."""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_fngd.distributed.owners import Kind, by_kind, exchanges
from hf_fngd.distributed.sharded import holds_blocks, is_sharded, is_split_by_first
from hf_fngd.updates.base import Update, register_rule
from hf_fngd.updates.orthogonal import STEPS, orthogonalize_blocks, working_dtype

# The root mean square of an orthogonalized update equals that of a typical AdamW step (Liu et al. 2025, Sec. 2.2).
_MUON_RMS = 0.2
# In bytes, of the matrices that are orthogonalized together: beyond it larger products are no faster, and on a CPU
# slower, as they leave its caches.
_MUON_BYTES, _MUON_BYTES_ON_CPU = 2**28, 2**21


@register_rule("muon", "momentum_buffer", reads=("ns_steps",), matrices=True, over_adamw=2.0)
def muon_update(update: Update) -> None:
    """``m <- lerp(g, m)``, ``p <- p - 0.2 lr sqrt(max(rows, columns)) orthogonalize(lerp(g, m))``; m has ``momentum``.

    The scale lets one learning rate serve matrices of any shape, and AdamW on the parameters beside them. Matrices of
    equal shapes are orthogonalized together; under DDP and FSDP2 each matrix by one process.
    """
    orthogonalized_momentum(update, lambda rows, columns: rows, lambda rows, columns: 0)


def orthogonalized_momentum(
    update: Update, height: Callable[[int, int], int], cheap: Callable[[int, int], int]
) -> None:
    """The step of `muon_update` on blocks of rows.

    Args:
        update: the update.
        height: from a matrix's rows and columns to the rows of a block.
        cheap: from a matrix's rows and columns to the most rows of a block that each process orthogonalizes for itself.
            Matrices with larger blocks are shared out among the processes that do the same update.

    Under FSDP2 a process that holds whole blocks treats its part of a matrix as a matrix of its own. If a parameter's
    first dimension counts matrices, a part consists of some of these.
    """
    (buffers,), grads, momentum = update.state, update.grads, update.group["momentum"]
    torch._foreach_lerp_(buffers, grads, 1 - momentum)
    update.decay()
    tensors, kinds = [], {}  # what parts belong to
    for place, (p, like, d) in enumerate(zip(update.params, update.sharded, grads, strict=True)):
        if not like.numel():  # the layer has no features
            tensors.append(like)
            continue
        count, columns = update.matrices[place]
        block = height(like.numel() // (count * columns), columns)
        if is_sharded(like):
            if count == like.shape[0] and is_split_by_first(like):
                like, count = p, p.shape[0]
            elif holds_blocks(like, block, count):
                like, count = p, 1
        tensors.append(like)
        if like.numel():  # a process may hold no expert at all
            kinds[place] = Kind(like.shape, count, columns, block, d.dtype, d.device, working_dtype(d.dtype, d.device))

    replicas = {
        place: update.replicas
        for place, kind in kinds.items()
        if update.replicas is not None and kind.height > cheap(kind.rows, kind.columns)
    }
    # States from before ns_steps was an argument lack it.
    steps = int(update.group.get("ns_steps", STEPS))
    limit = _MUON_BYTES_ON_CPU if all(kind.device.type == "cpu" for kind in kinds.values()) else _MUON_BYTES
    # The cost of a tensor: orthogonalizing takes operations in proportion.
    for exchange in exchanges(
        tensors, kinds, lambda kind: kind.shape.numel() * min(kind.height, kind.columns), limit, replicas
    ):
        directions: dict[int, Tensor] = {}
        if given := exchange.given:
            found = torch._foreach_lerp([grads[m] for m in given], [buffers[m] for m in given], momentum)
            directions = {m: d.to(kinds[m].working) for m, d in zip(given, found, strict=True)}
        wholes = exchange.collect(directions)
        updates: dict[int, Tensor] = {}
        for kind, alike in by_kind(exchange.mine, kinds).items():
            batch = torch.stack([wholes[m] for m in alike]).reshape(-1, kind.rows, kind.columns)
            made = orthogonalize_blocks(batch, kind.height, steps).to(exchange.dtype or kind.dtype)
            updates.update(zip(alike, made.reshape(-1, *kind.shape).unbind(), strict=True))
        parts = exchange.give_back(updates)
        for kind, alike in by_kind(exchange.members, kinds).items():
            torch._foreach_add_(
                [update.params[m] for m in alike],
                [parts[m].to(kind.device, kind.dtype) for m in alike],
                alpha=-update.group["lr"] * _MUON_RMS * max(kind.height, kind.columns) ** 0.5,
            )
