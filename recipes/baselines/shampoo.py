"""Shampoo (Gupta et al. 2018) in the form of today: running averages, and Adam's step size grafted on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from baselines.kronecker import check_periods


class Shampoo(Optimizer):
    """`L^-1/4 m R^-1/4`, L and R running averages of `g g^T` and `g^T g`, m that of g (Gupta et al. 2018, Alg. 1).

    Each matrix's update gets the norm of Adam's update (grafting; Anil et al. 2020, Shi et al. 2023), so that lr means
    what AdamW's does, and is Adam's until the first roots are computed. Weight decay is decoupled. The class of this
    name in pytorch-optimizer makes no update before the first roots, has no grafting and no interval of statistics;
    its ScalableShampoo keeps objects in the state that a checkpoint cannot load.

    Args:
        groups: Parameter groups of matrices; a filter `[o, i, k, k]` is the matrix `[o, i k k]`.
        lr: Learning rate.
        momentum: beta1, of m.
        beta2: Of L, R, once each statistics_every steps, and of Adam's squares in every step.
        eps: Of Adam.
        ridge: Added to L and R, in units of their largest eigenvalue.
        statistics_every: Steps between two updates of L and R.
        inverse_every: Steps between two computations of their roots; the first is at the end of that many steps.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.9,
        beta2: float = 0.99,
        eps: float = 1e-8,
        ridge: float = 1e-6,
        statistics_every: int = 10,
        inverse_every: int = 100,
    ) -> None:
        check_periods(statistics_every, inverse_every)
        defaults = {"lr": lr, "momentum": momentum, "beta2": beta2, "eps": eps, "ridge": ridge, "weight_decay": 0.0}
        super().__init__(
            groups, defaults | {"statistics_every": statistics_every, "inverse_every": inverse_every, "steps": 0}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Do one update."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    update = self._update(self.state[p], p.grad.flatten(1), group)
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.view_as(p), alpha=-group["lr"])
        return loss

    def _update(self, state: dict[str, Any], grad: Tensor, group: dict[str, Any]) -> Tensor:
        beta1, beta2, step = group["momentum"], group["beta2"], group["steps"]
        if not state:
            rows, columns = grad.shape
            state |= {"mean": torch.zeros_like(grad), "square": torch.zeros_like(grad), "updates": 0}
            state |= {"L": grad.new_zeros(rows, rows), "R": grad.new_zeros(columns, columns)}
        state["updates"] += 1
        state["mean"].lerp_(grad, 1 - beta1)
        state["square"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if step % group["statistics_every"] == 0:
            state["L"].lerp_(grad @ grad.mT, 1 - beta2)
            state["R"].lerp_(grad.mT @ grad, 1 - beta2)
        if step % group["inverse_every"] == 0:
            for side in "LR":
                state[f"{side}_root"] = inverse_fourth_root(state[side], group["ridge"])
        mean = state["mean"] / (1 - beta1 ** state["updates"])
        squares = state["square"] / (1 - beta2 ** state["updates"])
        adam = mean / (squares.sqrt() + group["eps"])
        if "L_root" not in state:
            return adam
        # Bias corrections of L and R are factors, which grafting removes.
        shampoo = state["L_root"] @ mean @ state["R_root"]
        tiny = torch.finfo(shampoo.dtype).tiny
        return shampoo * (adam.norm() / shampoo.norm().clamp(min=tiny))


def inverse_fourth_root(matrix: Tensor, ridge: float) -> Tensor:
    """`(M + ridge max(eigenvalue) I)^-1/4` of a positive semidefinite matrix; the identity where M is 0."""
    values, vectors = torch.linalg.eigh(matrix)
    largest = values[-1]
    if largest <= 0:
        return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    values = (values.clamp(min=0) + ridge * largest) ** -0.25
    return (vectors * values) @ vectors.mT
