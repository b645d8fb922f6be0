"""The paper's step ``1/lambda'`` as a factor of each layer's gradient, for update "momentum"."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_fngd.weights.algebra import accumulation_dtype
from hf_fngd.weights.solve import natural_step


def natural_scales(squared: Tensor, sizes: Tensor, rho: Tensor, spread: Tensor, damping: float) -> Tensor:
    """``1/lambda'`` of each layer, within a trust region: no update has a root mean square above lr, before momentum.

    Args:
        squared: ``||p||^2`` of the layers ``[L]``.
        sizes: numbers of entries ``[L]``.
        rho: noise ratios ``[L]``; NaN where a layer never measured one.
        spread: ``mean(w^2)`` ``[L]``.
        damping: alpha of Eq. 14.

    Returns:
        The factors ``[L]``, 0 for layers without a gradient.
    """
    # A layer that never measured rho has a plain gradient, of which rho = 1 makes the step.
    rho = rho.to(squared).nan_to_num(nan=1.0)
    scales = natural_step(rho, spread.to(squared), squared, damping)
    scales = torch.minimum(scales, sizes.sqrt() / squared.sqrt())
    # Finite in the gradients' dtype, where a gradient is subnormal.
    return torch.where(squared > 0, scales, 0.0).clamp(max=torch.finfo(torch.float32).max)


def scaled_gradients(grads: Sequence[Tensor], layers: Sequence[int], scales: Tensor) -> list[Tensor]:
    """Gradients times the factor ``scales[layer]`` of their layer, which half precision may not hold."""
    factors = scales.unbind()
    wide = [g.to(accumulation_dtype(g.dtype)) for g in grads]
    return [(x * factors[layer].to(x)).to(g.dtype) for x, g, layer in zip(wide, grads, layers, strict=True)]
