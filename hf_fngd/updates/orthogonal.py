"""Orthogonalize matrices, whole or in blocks of rows, by Newton-Schulz iterations (Jordan et al. 2024)."""

import math

import torch
from torch import Tensor

STEPS = 5
# The quintic polynomial of Jordan et al. brings singular values in (0, 1] to about 1.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrices: Tensor, steps: int = STEPS) -> Tensor:
    """Bring the singular values of each matrix ``[B, rows, columns]`` near 1, whatever its scale.

    For a wide X it repeats ``X <- (A + B G + C G^2) X`` with ``G = X X^T``. The result has `working_dtype`.
    """
    x = matrices.to(working_dtype(matrices.dtype, matrices.device))
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    # Divide by the largest entry first: squares of very small or large gradients leave the dtype's range.
    x = x / _largest(x).clamp(min=torch.finfo(x.dtype).tiny)
    x = (_on_gram_matrices if prefers_gram(x.shape[-2], x.shape[-1], x.dtype) else _on_matrices)(x, steps)
    return x.mT if tall else x


def orthogonalize_blocks(matrices: Tensor, size: int, steps: int = STEPS) -> Tensor:
    """`orthogonalize` each block of rows of each matrix ``[B, rows, columns]`` by itself; in `working_dtype`.

    The blocks are equal, and as few as ``size`` rows at most allow. If the rows do not divide evenly, zeros fill the
    last block up, which change nothing; the block is scaled so that its entries are as large as the others'.
    """
    rows, columns = matrices.shape[-2:]
    count, height = block_shape(rows, size)
    x = torch.nn.functional.pad(matrices, (0, 0, 0, count * height - rows)) if count * height > rows else matrices
    blocks = orthogonalize(x.reshape(-1, height, columns), steps)
    last = rows - (count - 1) * height
    if last < height and height > columns:
        blocks.view(len(matrices), count, height, columns)[:, -1] *= (max(last, columns) / height) ** 0.5
    return blocks.reshape(len(matrices), count * height, columns)[:, :rows]


def block_shape(rows: int, size: int) -> tuple[int, int]:
    """How many blocks `orthogonalize_blocks` makes of a matrix's rows, and how many rows each has."""
    count = math.ceil(rows / size)
    return count, math.ceil(rows / count)


def count_operations(rows: int, columns: int, steps: int, dtype: torch.dtype) -> int:
    """How many additions and multiplications `orthogonalize` takes on one matrix, in a working dtype."""
    r, c = sorted((rows, columns))
    if prefers_gram(r, c, dtype):
        return 4 * r * r * c + (8 * steps - 6) * r**3
    return steps * (4 * r * r * c + 2 * r**3)


def prefers_gram(rows: int, columns: int, dtype: torch.dtype) -> bool:
    """Whether iterating on Gram matrices is faster, for a wide matrix with r rows and c columns.

    With five steps it takes fewer operations (`count_operations`) from c = 1.5 r on, and half the time at 4 r (on a
    CPU). Half precision does not hold what the iteration makes of a Gram matrix's rounding; float32 has errors of 1e-3
    at most.
    """
    return columns >= 2 * rows and dtype in (torch.float32, torch.float64)


def working_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Bfloat16 on CUDA devices with units for it, where it is accurate enough and fastest; else float32 or float64."""
    if dtype != torch.float64 and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    return torch.promote_types(dtype, torch.float32)


def _largest(x: Tensor) -> Tensor:
    """The largest absolute value of each matrix, ``[B, 1, 1]``; on a CPU ten times as fast as an infinity norm."""
    return torch.maximum(x.amax((-2, -1), keepdim=True), x.amin((-2, -1), keepdim=True).neg())


def _on_matrices(x: Tensor, steps: int) -> Tensor:
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        x = torch.baddbmm(x, polynomial, x, beta=_A)
    return x


def _on_gram_matrices(x: Tensor, steps: int) -> Tensor:
    """Multiply the polynomials P up, and apply the product to X at the end: where X becomes ``P X``, G is ``P G P``.

    Every `STEPS` steps G is formed anew, because its rounding grows twelvefold a step if X is rank deficient.
    """
    gram = x @ x.mT
    # The squared norm of X is in it.
    squared = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None].clamp(min=torch.finfo(x.dtype).tiny)
    x = (_polynomials(gram / squared, min(steps, STEPS)) * squared.rsqrt()) @ x
    for done in range(STEPS, steps, STEPS):
        x = _polynomials(x @ x.mT, min(steps - done, STEPS)) @ x
    return x


def _polynomials(gram: Tensor, steps: int) -> Tensor:
    product = polynomial = _polynomial(gram)
    for _ in range(steps - 1):
        gram = polynomial @ gram @ polynomial
        polynomial = _polynomial(gram)
        product = polynomial @ product
    return product


def _polynomial(gram: Tensor) -> Tensor:
    found = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
    found.diagonal(dim1=-2, dim2=-1).add_(_A)
    return found
