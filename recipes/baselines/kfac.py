"""KFAC (Martens & Grosse 2015): the curvature of a layer is the Kronecker product of two small matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from baselines.kronecker import KroneckerOptimizer, average, check_periods


class KFAC(KroneckerOptimizer):
    """`p = (G + sqrt(gamma) / pi I)^-1 g (A + pi sqrt(gamma) I)^-1`, second moments A of inputs, G of gradients.

    Positions of a sequence count as samples ("expand" of Eschenhagen et al. 2023) and G is that of the training
    targets (the empirical Fisher matrix, as FNGD's). pi is that of Sec. 6.3, from the traces.

    Its own option is inverse_every, steps between two inversions, a multiple of statistics_every.
    """

    averages = ("A", "G")
    options: ClassVar = KroneckerOptimizer.options | {"damping": 0.003, "statistics_every": 10, "inverse_every": 100}

    def __init__(self, groups: list[dict[str, Any]], layers: Sequence[nn.Module], **options: Any) -> None:
        super().__init__(groups, layers, **options)
        check_periods(**self.defaults)

    def statistics(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """`sum a a^T` and `sum g g^T`."""
        return a.mT @ a, g.mT @ g

    def update(
        self, state: dict[str, Any], sums: tuple[Tensor, Tensor], rows: Tensor, samples: Any, group: dict[str, Any]
    ) -> None:
        """Average the factors; invert them where it is time."""
        average(state, "A", sums[0] / rows, group["decay"])
        average(state, "G", sums[1] * samples, group["decay"])  # (M g)(M g)^T / M
        if group["steps"] % group["inverse_every"] == 0 or "A_inverse" not in state:
            state["A_inverse"], state["G_inverse"] = damped_inverses(state["A"], state["G"], group["damping"])

    def precondition(self, state: dict[str, Any], grad: Tensor, group: dict[str, Any]) -> Tensor:
        """`G^-1 grad A^-1`."""
        return (state["G_inverse"] @ grad.to(state["A"].dtype) @ state["A_inverse"]).to(grad.dtype)


class EigenKFAC(KFAC):
    """`p = (G (x) A + gamma I)^-1 g`, by the eigenvectors of A and G, in place of damping each of the two.

    The form that Pauloski et al. (2020) found the better one, and with which FNGD's authors compare.
    """

    def update(
        self, state: dict[str, Any], sums: tuple[Tensor, Tensor], rows: Tensor, samples: Any, group: dict[str, Any]
    ) -> None:
        """Average the factors; decompose them where it is time."""
        average(state, "A", sums[0] / rows, group["decay"])
        average(state, "G", sums[1] * samples, group["decay"])
        if group["steps"] % group["inverse_every"] == 0 or "A_values" not in state:
            for name in self.averages:
                values, vectors = torch.linalg.eigh(state[name].double())  # many are 0, which float32 may not manage
                values, vectors = values.to(state[name].dtype), vectors.to(state[name].dtype)
                state |= {f"{name}_values": values.clamp(min=0), f"{name}_vectors": vectors}

    def precondition(self, state: dict[str, Any], grad: Tensor, group: dict[str, Any]) -> Tensor:
        """`U_G (U_G^T grad U_A / (values + gamma)) U_A^T`, the values those of the Kronecker product."""
        ua, ug = state["A_vectors"], state["G_vectors"]
        values = state["G_values"].outer(state["A_values"]) + group["damping"]
        return (ug @ (ug.mT @ grad.to(ua.dtype) @ ua / values) @ ua.mT).to(grad.dtype)


def damped_inverses(A: Tensor, G: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return the inverses of `A + pi sqrt(gamma) I` and `G + sqrt(gamma) / pi I`, pi^2 the ratio of mean diagonals."""
    tiny = torch.finfo(A.dtype).tiny
    pi = ((A.diagonal().mean() + tiny) / (G.diagonal().mean() + tiny)).sqrt()
    inverses = []
    for factor, share in ((A, pi), (G, 1 / pi)):
        damped = factor + share * damping**0.5 * torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        inverses.append(torch.cholesky_inverse(torch.linalg.cholesky(damped)))
    return inverses[0], inverses[1]
