"""Eva (Zhang, Shi & Li 2023): KFAC with Kronecker factors of rank one, inverted by the Sherman-Morrison formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from baselines.kronecker import KroneckerOptimizer, average


class Eva(KroneckerOptimizer):
    """`p = (C + gamma I)^-1 g` with `C = (a a^T) (x) (b b^T)`, a and b running means of inputs and output gradients.

    Args:
        groups: See `KroneckerOptimizer`, and for what follows.
        layers: The layers.
        lr: Learning rate.
        momentum: Of the preconditioned gradients.
        damping: gamma.
        decay: Of the running means.
        kl_clip: Bound of the trust region.
        statistics_every: Steps between two updates of the means; the paper's is 1.
    """

    averages = ("a", "b")

    def __init__(
        self,
        groups: list[dict[str, Any]],
        layers: Sequence[nn.Module],
        *,
        lr: float,
        momentum: float = 0.9,
        damping: float = 0.03,
        decay: float = 0.95,
        kl_clip: float = 0.001,
        statistics_every: int = 1,
    ) -> None:
        super().__init__(
            groups,
            layers,
            lr=lr,
            momentum=momentum,
            damping=damping,
            decay=decay,
            kl_clip=kl_clip,
            statistics_every=statistics_every,
        )

    def statistics(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """`sum a` and `sum g`."""
        return a.sum(0), g.sum(0)

    def update(self, state: dict[str, Any], sums: tuple[Tensor, Tensor], rows: Tensor, group: dict[str, Any]) -> None:
        """Average the two vectors."""
        average(state, "a", sums[0] / rows, group["decay"])
        average(state, "b", sums[1], group["decay"])  # the mean of M g

    def precondition(self, state: dict[str, Any], grad: Tensor, group: dict[str, Any]) -> Tensor:
        """`(g - (b^T g a) / (gamma + |a|^2 |b|^2) b a^T) / gamma`."""
        a, b = (state[name].to(grad.dtype) for name in ("a", "b"))
        share = (b @ grad @ a) / (group["damping"] + a.square().sum() * b.square().sum())
        return (grad - share * b.outer(a)) / group["damping"]
