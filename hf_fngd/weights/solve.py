"""From a Gram matrix to the sample weights of Eq. 9, and from these to the paper's step. Pure functions.

Symbols as in `hf_fngd.weights.algebra`, with ``p = sum_n w_n h_n``. Alpha is the damping of Eq. 14. Functions of many
layers take one number for each layer ``[L]``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_fngd.weights.algebra import widest_dtype


class Coefficients(NamedTuple):
    """Sample weights ``[N]`` of mean 1 (Eq. 9 up to one scalar), and the gradient noise ratio ``||K||_F / ||p||^2``.

    Where K was unusable (not finite, or all gradients zero), w is 1 and rho is NaN.
    """

    w: Tensor
    rho: Tensor


def coefficients(k: Tensor, damping: float) -> Coefficients:
    """Solve ``w = lambda' (K + lambda I)^-1 1`` with ``lambda = alpha ||K||_F`` and ``mean(w) = 1``, in k's dtype.

    With these sample weights ``sum_n w_n h_n = lambda' (F + lambda I)^-1 g`` (Eq. 9 and 14), where
    ``lambda' = N / (1^T (K + lambda I)^-1 1)``. K ``[N, N]`` is positive semidefinite up to rounding. Its Cholesky
    factorization, scaled to unit norm, is in float64 where the device has it; the host does not wait for the device.
    """
    matrix = k.to(widest_dtype(k.device))
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
    """Lambda of any step from ``||p||^2``, in its unit: ``alpha rho ||p||^2`` (``alpha ||K||_F``, Eq. 14)."""
    return damping * rho * squared_norm


def natural_step(rho: Tensor, spread: Tensor, squared_norm: Tensor, damping: float) -> Tensor:
    """The paper's step ``1/lambda'`` from rho, ``mean(w^2)`` and ``||p||^2``; infinite where p = 0.

    ``w^T (K + lambda I) w = N lambda'`` gives ``lambda' = ||p||^2 + lambda mean(w^2)``.
    """
    return 1 / (squared_norm + damping_from_gradient(rho, squared_norm, damping) * spread)
