"""``block_muon``: Muon on blocks of rows, each orthogonalized by itself, at a small part of Muon's price.

Orthogonalizing r rows of c entries takes ``4 r^2 c`` operations and some ``34 r^3`` more, whatever the batch. So whole
matrices cost little beside a large batch; beside a small one they cost several times forward and backward. Under FSDP2
a process that holds whole blocks exchanges nothing.
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

# Without a size a block has a SHARE-th of the matrix's shorter side, and FEWEST rows at least (half as many lost half a
# BLEU). It has more rows as long as orthogonalizing takes at most a PRICE-th of the layer's forward and backward.
SHARE, FEWEST, PRICE = 4, 32, 4


@register_rule("block_muon", "momentum_buffer", reads=("block_size", "ns_steps"), matrices=True, over_adamw=2.0)
def block_muon_update(update: Update) -> None:
    """``m <- lerp(g, m)``, ``p <- p - 0.2 lr sqrt(max(r, columns)) orthogonalize_blocks(lerp(g, m))``.

    m has ``momentum``, and a block r rows (`block_rows`).
    """
    size, positions = update.group["block_size"], int(update.group.get("positions", 0))
    orthogonalized_momentum(update, lambda rows, columns: block_rows(rows, columns, size, positions), fewest_rows)


def fewest_rows(rows: int, columns: int) -> int:
    """The rows of the smallest blocks, which are cheaper to orthogonalize than to send to another process."""
    return max(FEWEST, min(rows, columns) // SHARE)


@functools.cache
def block_rows(rows: int, columns: int, size: float | None, positions: int = 0) -> int:
    """How many rows a block of a matrix has: at most ``size``.

    Without a size it has a quarter of the shorter side, and at least 32. It has more as long as orthogonalizing the
    matrix takes at most a quarter of the operations of its layer's forward and backward, which are
    ``6 positions rows columns`` a step. Operations are counted for float32 and `STEPS` on any device, so that blocks
    are the same everywhere.
    """
    if size is not None:
        return block_shape(rows, int(size))[1]
    fewest = fewest_rows(rows, columns)
    affordable = 6 * positions * rows * columns / PRICE
    for number in range(1, block_shape(rows, fewest)[0]):
        count, height = block_shape(rows, -(-rows // number))
        if count * count_operations(height, columns, STEPS, torch.float32) <= affordable:
            return height
    return block_shape(rows, fewest)[1]


def known_positions(groups: Groups) -> int | None:
    """How many positions a layer sees in a step. Parameter groups without a ``block_size`` keep the number.

    0: no step has shown it yet. None: there is no such group.
    """
    return min((group["positions"] for group in groups if "positions" in group), default=None)


def keep_positions(groups: Groups, positions: int | None) -> None:
    """Write the positions that a step has shown into the groups that need them, and log what follows.

    The first step does, and the first one after layers were unfrozen.
    """
    if positions and known_positions(groups) not in (None, positions):
        for group in groups:
            if "positions" in group:
                group["positions"] = positions
        logger.info("%s", describe_blocks(groups))


def describe_blocks(groups: Groups) -> str:
    """Say how many matrices are orthogonalized whole; empty before the positions are known."""
    positions = known_positions(groups)
    if not positions:
        return ""
    whole = matrices = 0
    for group in (group for group in groups if "positions" in group):
        for p, (count, columns) in zip(group["params"], group["matrices"], strict=True):
            if not p.requires_grad:
                continue
            rows = p.numel() // max(1, count * columns)
            matrices += count
            whole += count * (rows == 0 or block_rows(rows, columns, None, positions) == rows)
    others = "" if whole == matrices else ", and the others in blocks of rows"
    return (
        f"At {positions} positions a step update='block_muon' orthogonalizes {whole} of {matrices} matrices whole"
        f"{others}. Checkpoints keep this number; block_size sets the rows."
    )
