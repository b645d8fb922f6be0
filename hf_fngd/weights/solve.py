"""From a Gram matrix to the sample weights of Eq. 9, and from these to the paper's step. Pure functions.

Symbols as in `hf_fngd.weights.algebra`; equations are those of arXiv 2403.03473.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Coefficients(NamedTuple):
    """What one layer takes from one Gram matrix.

    Attributes:
        w: sample weights ``[N]``, mean 1, dimensionless (Eq. 9 up to one scalar).
        rho: ``||K||_F / ||p||^2`` with ``p = sum_n w_n h_n``, a dimensionless scalar tensor: the layer's gradient
            noise ratio. NaN where K was unusable (not finite, or all gradients zero); w is then 1.
    """

    w: Tensor
    rho: Tensor


def coefficients(k: Tensor, damping: float) -> Coefficients:
    """Solve ``w = lambda' (K + lambda I)^-1 1`` with ``lambda = damping ||K||_F`` and ``mean(w) = 1``.

    With these sample weights ``sum_n w_n h_n = lambda' (F + lambda I)^-1 g`` (Eq. 9 and 14), where
    ``lambda' = N / (1^T (K + lambda I)^-1 1)``. The solve is a Cholesky factorization in float64 (float32 on
    devices without it) of K scaled to unit norm. It forms no inverse, and the host does not wait for the device.

    Args:
        k: Gram matrix ``[N, N]``, symmetric positive semidefinite up to rounding.
        damping: alpha of Eq. 14, positive and dimensionless.

    Returns:
        `Coefficients`, in k's dtype.
    """
    matrix = k if k.device.type == "mps" else k.double()
    norm = torch.linalg.matrix_norm(matrix)
    usable = torch.isfinite(norm) & (norm > 0)
    matrix = torch.where(usable, matrix / torch.where(usable, norm, 1), 0)
    n = k.shape[0]
    damped = matrix + damping * torch.eye(n, dtype=matrix.dtype, device=matrix.device)
    factor, failed = torch.linalg.cholesky_ex(damped)
    solution = torch.cholesky_solve(matrix.new_ones(n, 1), factor).squeeze(1)
    w = solution * (n / solution.sum())
    rho = n / (w @ matrix @ w)
    usable = usable & (failed == 0) & torch.isfinite(w).all() & torch.isfinite(rho) & (rho > 0)
    return Coefficients(torch.where(usable, w, 1).to(k.dtype), torch.where(usable, rho, torch.nan).to(k.dtype))


def damping_from_gradient(rho: Tensor, squared_norm: Tensor, damping: float) -> Tensor:
    """Lambda of any step from its weighted gradient: ``alpha rho ||p||^2`` (``alpha ||K||_F``, Eq. 14).

    Args:
        rho: noise ratios ``[L]``.
        squared_norm: ``||p||^2`` of the layers ``[L]``; lambda has its unit.
        damping: alpha.
    """
    return damping * rho * squared_norm


def natural_step(rho: Tensor, spread: Tensor, squared_norm: Tensor, damping: float) -> Tensor:
    """The paper's step ``1/lambda'`` from quantities that every step has.

    ``w^T (K + lambda I) w = N lambda'`` gives ``lambda' = ||p||^2 + lambda mean(w^2)``, hence
    ``1/lambda' = 1 / (||p||^2 (1 + alpha rho mean(w^2)))``.

    Args:
        rho: noise ratios ``[L]``.
        spread: ``mean(w^2)`` of the layers ``[L]``, at least 1.
        squared_norm: ``||p||^2`` ``[L]``; ``1/lambda'`` has the inverse of its unit, and is infinite where p = 0.
        damping: alpha.
    """
    return 1 / (squared_norm + damping_from_gradient(rho, squared_norm, damping) * spread)
