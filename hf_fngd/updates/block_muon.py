"""``block_muon``: Muon on blocks of rows, each orthogonalized by itself, at a small part of Muon's price.

Orthogonalizing r rows of c entries takes ``4 r^2 c`` operations and some ``34 r^3`` more, so that blocks of r rows cost
r over the number of rows of what the whole matrix does. Under FSDP2 a process with whole blocks exchanges nothing.
"""

from functools import partial

from torch import Tensor

from hf_fngd.distributed.sharded import holds_blocks
from hf_fngd.updates.base import Update, register_rule
from hf_fngd.updates.muon import orthogonalized_momentum, steps_of
from hf_fngd.updates.orthogonal import block_shape, orthogonalize_blocks

BLOCK_SIZE = 32


@register_rule("block_muon", "momentum_buffer", matrices=True)
def block_muon_update(update: Update) -> None:
    """``m <- lerp(g, m)``, ``p <- p - 0.2 lr sqrt(max(r, columns)) orthogonalize_blocks(lerp(g, m))``.

    m has ``momentum``, and a block at most ``block_size`` rows r.
    """
    size = int(update.group["block_size"])
    orthogonal = partial(orthogonalize_blocks, size=size, steps=steps_of(update))

    def height(rows: int) -> int:
        return block_shape(rows, size)[1]

    def apart(parameter: Tensor, matrices: int) -> bool:
        return holds_blocks(parameter, size, matrices)

    orthogonalized_momentum(update, orthogonal, height, apart)
