"""Control experiments: what FNGD's weights do when they know nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from hf_fngd import FNGD
from hf_fngd.coefficients import Coefficients
from hf_fngd.sharing import SharingPolicy


class ShuffledWeights(TrainerCallback):
    """Gives the weights of every coefficient step to samples of the batch drawn at random.

    Their spread stays as it is: what a run gains without this and not with it is due to whom the weights are given.
    """

    def on_train_begin(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
        """Change the policy of the optimizer, which is FNGD."""
        optimizer = getattr(optimizer, "optimizer", optimizer)
        assert isinstance(optimizer, FNGD)
        shuffle_weights(optimizer.preconditioner.policy)


def shuffle_weights(policy: SharingPolicy) -> None:
    """Let a policy's `solve` return its weights in random order, and the rho of the gradient so weighted."""
    solve = policy.solve

    def shuffled(k: Tensor, damping: float) -> Coefficients:
        w = solve(k, damping).w
        w = w[torch.randperm(len(w), device=w.device)]
        return Coefficients(w, len(w) * torch.linalg.matrix_norm(k) / (w @ k @ w))

    policy.solve = shuffled  # type: ignore[method-assign]
