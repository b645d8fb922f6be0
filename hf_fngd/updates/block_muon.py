"""``block_muon``: Muon on blocks of rows, each orthogonalized by itself, at a small part of Muon's price.

Orthogonalizing r rows of c entries takes ``4 r^2 c`` operations and some ``34 r^3`` more, whatever the batch. So whole
matrices cost little beside a large batch, and several times forward and backward beside a small one. Under FSDP2 a
process with whole blocks exchanges nothing.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch

from hf_fngd.updates.base import Update, register_rule
from hf_fngd.updates.muon import orthogonalized_momentum
from hf_fngd.updates.orthogonal import STEPS, block_shape, count_operations

logger = logging.getLogger(__name__)

Groups = Sequence[dict[str, Any]]

# Without a size: as many rows as take this part of a layer's own operations in forward and backward,
PRICE = 16
# but this part of a matrix's shorter side, and so many rows, at least. Half of that lost half a BLEU.
SHARE, FEWEST = 4, 32


@register_rule("block_muon", "momentum_buffer", matrices=True)
def block_muon_update(update: Update) -> None:
    """``m <- lerp(g, m)``, ``p <- p - 0.2 lr sqrt(max(r, columns)) orthogonalize_blocks(lerp(g, m))``.

    m has ``momentum``, and a block r rows (`block_rows`).
    """
    size, positions = update.group["block_size"], int(update.group.get("positions", 0))
    orthogonalized_momentum(update, lambda rows, columns: block_rows(rows, columns, size, positions))


@functools.cache
def block_rows(rows: int, columns: int, size: float | None, positions: int = 0) -> int:
    """How many rows a block of a matrix has: at most ``size``.

    None: so many that the matrix's orthogonalization takes at most a sixteenth of the operations of its layer's forward
    and backward, ``6 positions rows columns`` a step; but at least a quarter of the shorter side, and 32. Operations
    are counted as for float32 and `STEPS` wherever it runs, so that blocks are the same on all machines.
    """
    if size is not None:
        return block_shape(rows, int(size))[1]
    fewest = max(FEWEST, min(rows, columns) // SHARE)
    affordable = 6 * positions * rows * columns / PRICE
    for number in range(1, block_shape(rows, fewest)[0]):
        count, height = block_shape(rows, -(-rows // number))
        if count * count_operations(height, columns, STEPS, torch.float32) <= affordable:
            return height
    return block_shape(rows, fewest)[1]


def known_positions(groups: Groups) -> int | None:
    """How many positions a layer sees in a step, as groups without a size know; 0: not yet; None: no such group."""
    return min((group["positions"] for group in groups if "positions" in group), default=None)


def settle(groups: Groups, positions: int | None) -> None:
    """Tell it the groups that do not know it yet, once a step has shown it."""
    if positions and known_positions(groups) == 0:
        for group in groups:
            if "positions" in group:
                group["positions"] = positions
        logger.info("%s", settled(groups))


def settled(groups: Groups) -> str:
    """What became of the matrices of groups without a size; empty before the positions are known."""
    positions = known_positions(groups)
    if not positions:
        return ""
    whole = matrices = 0
    for group in groups:
        for p, (count, columns) in zip(group["params"], group["matrices"], strict=True) if "positions" in group else ():
            rows = p.numel() // max(1, count * columns)
            matrices += count
            whole += count * (rows == 0 or block_rows(rows, columns, None, positions) == rows)
    return (
        f"At {positions} positions a step update='block_muon' orthogonalizes {whole} of {matrices} matrices whole, and "
        "the others in blocks of rows. Checkpoints keep this number; block_size sets the rows."
    )
