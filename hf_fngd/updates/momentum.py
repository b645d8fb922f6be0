"""``momentum``: heavy-ball momentum. The fallback rule "sgd", and behind `hf_fngd.updates.natural` the paper's step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_fngd.updates.base import Hyperparameters, Tensors, decay, register_rule


@register_rule("momentum", "momentum_buffer")
def momentum_update(
    params: Tensors,
    grads: Tensors,
    state: Sequence[Tensors],
    steps: Sequence[int],
    group: Hyperparameters,
    sharded: Sequence[Tensor],
) -> None:
    """As in torch's SGD: ``m <- momentum m + g``, ``p <- p - lr m``. lr multiplies the gradient as it comes."""
    (buffers,) = state
    torch._foreach_mul_(buffers, group.momentum)
    torch._foreach_add_(buffers, grads)
    decay(params, group)
    torch._foreach_add_(params, buffers, alpha=-group.lr)
