"""``momentum``: heavy-ball momentum. The fallback rule "sgd", and behind `hf_fngd.updates.natural` the paper's step."""

from __future__ import annotations

import torch

from hf_fngd.updates.base import Update, register_rule


@register_rule("momentum", "momentum_buffer")
def momentum_update(update: Update) -> None:
    """As in torch's SGD: ``m <- momentum m + g``, ``p <- p - lr m``. lr multiplies the gradient as it comes."""
    (buffers,) = update.state
    torch._foreach_mul_(buffers, update.group["momentum"])
    torch._foreach_add_(buffers, update.grads)
    update.decay()
    torch._foreach_add_(update.params, buffers, alpha=-update.group["lr"])
