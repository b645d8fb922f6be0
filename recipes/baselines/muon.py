"""Muon (Jordan et al. 2024): orthogonalized momentum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from hf_fngd.updates.orthogonal import orthogonalize


class Muon(Optimizer):
    """The update of `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`, of equal matrices at once.

    torch's own does its products in bfloat16 whatever the device, which on a CPU without such units takes many times
    as long as in float32; here they are in bfloat16 on CUDA alone.

    Args:
        groups: Parameter groups of matrices; a filter `[o, i, k, k]` is the matrix `[o, i k k]`.
        lr: Learning rate; the root mean square of an update is 0.2 lr, that of a typical AdamW step (Liu et al. 2025).
        momentum: Of Nesterov's momentum.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Do one update."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for shape in dict.fromkeys(p.shape for p in params):
                same = [p for p in params if p.shape == shape]
                grads = [p.grad for p in same]
                buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in same]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                directions = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"]))
                updates = orthogonalize(directions.flatten(2)).to(same[0].dtype)
                torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
                scale = 0.2 * max(updates.shape[1:]) ** 0.5
                torch._foreach_add_(same, list(updates.view_as(directions).unbind()), alpha=-group["lr"] * scale)
        return loss
