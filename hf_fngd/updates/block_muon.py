"""``block_muon``: Muon on blocks of rows, each orthogonalized by itself, at a small part of Muon's price.

Orthogonalizing r rows of c entries takes ``4 r^2 c`` operations and some ``34 r^3`` more, so that blocks of r rows cost
r over the number of rows of what the whole matrix does. Under FSDP2 a process with whole blocks exchanges nothing.
"""

from hf_fngd.updates.base import Update, register_rule
from hf_fngd.updates.muon import orthogonalized_momentum
from hf_fngd.updates.orthogonal import block_shape

# Without a size: this share of a matrix's shorter side, and so many rows at least. Half the share lost half a BLEU.
SHARE, FEWEST = 4, 32


@register_rule("block_muon", "momentum_buffer", matrices=True)
def block_muon_update(update: Update) -> None:
    """``m <- lerp(g, m)``, ``p <- p - 0.2 lr sqrt(max(r, columns)) orthogonalize_blocks(lerp(g, m))``.

    m has ``momentum``, and a block r rows (`block_rows`).
    """
    size = update.group["block_size"]
    orthogonalized_momentum(update, lambda rows, columns: block_rows(rows, columns, size))


def block_rows(rows: int, columns: int, size: float | None) -> int:
    """How many rows a block of a matrix has: at most ``size``; None: a quarter of the shorter side, at least 32."""
    most = max(FEWEST, min(rows, columns) // SHARE) if size is None else int(size)
    return block_shape(rows, most)[1]
