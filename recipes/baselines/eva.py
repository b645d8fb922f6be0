"""Eva (Zhang, Shi & Li 2023): KFAC with Kronecker factors of rank one, inverted by the Sherman-Morrison formula."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from baselines.kronecker import KroneckerOptimizer, average


class Eva(KroneckerOptimizer):
    """`p = (C + gamma I)^-1 g` with `C = (a a^T) (x) (b b^T)`, a and b running means of inputs and output gradients.

    gamma is the damping. The means are those of the paper, of every step.
    """

    averages = ("a", "b")
    options: ClassVar = KroneckerOptimizer.options | {"damping": 0.03, "statistics_every": 1}

    def statistics(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """`sum a` and `sum g`."""
        return a.sum(0), g.sum(0)

    def update(
        self, state: dict[str, Any], sums: tuple[Tensor, Tensor], rows: Tensor, samples: Any, group: dict[str, Any]
    ) -> None:
        """Average the two vectors."""
        average(state, "a", sums[0] / rows, group["decay"])
        average(state, "b", sums[1], group["decay"])  # the mean of M g

    def precondition(self, state: dict[str, Any], grad: Tensor, group: dict[str, Any]) -> Tensor:
        """`(g - (b^T g a) / (gamma + |a|^2 |b|^2) b a^T) / gamma`."""
        a, b = (state[name].to(grad.dtype) for name in ("a", "b"))
        share = (b @ grad @ a) / (group["damping"] + a.square().sum() * b.square().sum())
        return (grad - share * b.outer(a)) / group["damping"]
