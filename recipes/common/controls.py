"""Control experiments: weights that know less than FNGD's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from hf_fngd import FNGD
from hf_fngd.coefficients import Coefficients, coefficients, with_weights
from hf_fngd.sharing import SharingPolicy

_Weights = Callable[[Tensor, float], Tensor]


def _shuffled(k: Tensor, damping: float) -> Tensor:
    w = coefficients(k, damping).w
    return w[torch.randperm(len(w), device=w.device)]


def _diagonal(k: Tensor, damping: float) -> Tensor:
    return 1 / (k.diagonal() + damping * torch.linalg.matrix_norm(k))


CONTROLS: dict[str, tuple[_Weights, str]] = {
    "shuffled": (_shuffled, "the weights of each step, given to samples of its batch drawn at random"),
    "diagonal": (_diagonal, "those of the Gram matrix's diagonal alone, which knows the norms and no directions"),
}
"""What weights ``[N]`` each control takes from a Gram matrix ``[N, N]`` and a damping, up to a factor, and in words."""


class Control(TrainerCallback):
    """Replaces the weights of coefficient steps: what a run gains without this alone is due to what these do not know.

    Args:
        name: One of `CONTROLS`.
    """

    def __init__(self, name: str) -> None:
        self.weights = CONTROLS[name][0]

    def on_train_begin(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
        """Change the policy of the optimizer, which is FNGD."""
        optimizer = getattr(optimizer, "optimizer", optimizer)
        assert isinstance(optimizer, FNGD)
        replace_weights(optimizer.preconditioner.policy, self.weights)


def replace_weights(policy: SharingPolicy, weights: _Weights) -> None:
    """Let a policy's `solve` return other weights, with mean 1, and the rho of the gradient so weighted."""

    def solve(k: Tensor, damping: float) -> Coefficients:
        w = weights(k, damping)
        return with_weights(k, w / w.mean())

    policy.solve = solve  # type: ignore[method-assign]
