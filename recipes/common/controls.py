"""Control experiments: other weights than FNGD's in its coefficient steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
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


def _third(k: Tensor, damping: float) -> Tensor:
    return coefficients(k, damping).w if torch.rand(()) < 1 / 3 else k.new_ones(len(k))


class _Pairs:
    """One layer's weights for the next one below it too, as the paper's blocks of layers share one Gram matrix."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.solved = 0
        self.w: Tensor | None = None

    def __call__(self, k: Tensor, damping: float) -> Tensor:
        """Backward goes through the layers from the last to the first; the first two are a pair."""
        place = self.layers - 1 - self.solved % self.layers
        self.solved += 1
        if self.w is None or place % 2 == 1 or place == self.layers - 1:
            self.w = coefficients(k, damping).w
        return self.w


class _Improved:
    """``(K + lambda I)^-1 s`` of Wu et al. (2024); s_n is the squared norm of a sample's gradient at the logits."""

    def __init__(self, model: nn.Module) -> None:
        self.s: Tensor | None = None
        model.register_forward_hook(self._watch)

    def _watch(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if output["logits"].requires_grad:
            output["logits"].register_hook(self._keep)

    def _keep(self, g: Tensor) -> None:
        self.s = g.flatten(1).square().sum(dim=1)

    def __call__(self, k: Tensor, damping: float) -> Tensor:
        assert self.s is not None
        damped = k.double().clone()
        damped.diagonal().add_(damping * torch.linalg.matrix_norm(damped))
        return torch.linalg.solve(damped, self.s.double()).to(k.dtype)


CONTROLS: dict[str, tuple[Callable[[nn.Module, int], _Weights], str]] = {
    "shuffled": (
        lambda model, layers: _shuffled,
        "the weights of each step, given to samples of its batch drawn at random",
    ),
    "diagonal": (
        lambda model, layers: _diagonal,
        "those of the Gram matrix's diagonal alone, which knows the norms and no directions",
    ),
    "third": (lambda model, layers: _third, "in each step a third of the layers, drawn at random; ones in the others"),
    "pairs": (lambda model, layers: _Pairs(layers), "every second layer's, for the layer below it too"),
    "improved": (
        lambda model, layers: _Improved(model),
        "those that let each sample's loss fall by the squared norm of its gradient at the logits, not by one amount",
    ),
}
"""By its name, what makes a control's weights for a model of so many layers, and in words which they are.

They take a Gram matrix ``[N, N]`` and a damping, and return ``[N]``, up to a factor.
"""


class Control(TrainerCallback):
    """Replaces the weights of coefficient steps: what a run gains without this alone is due to what these do not know.

    Args:
        name: One of `CONTROLS`.
    """

    def __init__(self, name: str) -> None:
        self.make = CONTROLS[name][0]

    def on_train_begin(self, *args: Any, model: nn.Module, optimizer: Any, **kwargs: Any) -> None:
        """Change the policy of the optimizer, which is FNGD."""
        optimizer = getattr(optimizer, "optimizer", optimizer)
        assert isinstance(optimizer, FNGD)
        preconditioner = optimizer.preconditioner
        replace_weights(preconditioner.policy, self.make(model, len(preconditioner.layers)))


def replace_weights(policy: SharingPolicy, weights: _Weights) -> None:
    """Let a policy's `solve` return other weights, with mean 1, and the rho of the gradient so weighted."""

    def solve(k: Tensor, damping: float) -> Coefficients:
        w = weights(k, damping)
        return with_weights(k, w / w.mean())

    policy.solve = solve  # type: ignore[method-assign]
