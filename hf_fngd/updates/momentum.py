"""``momentum``: heavy-ball momentum, the fallback rule "sgd"; and ``1/lambda'``, which makes it the paper's step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_fngd.updates.base import Update, register_rule
from hf_fngd.weights.algebra import accumulation_dtype
from hf_fngd.weights.solve import natural_step


@register_rule("momentum", "momentum_buffer", over_adamw=0.1)
def momentum_update(update: Update) -> None:
    """As torch's SGD: ``m <- momentum m + g``, ``p <- p - lr m``. The gradient's scale is left as it is."""
    (buffers,) = update.state
    torch._foreach_mul_(buffers, update.group["momentum"])
    torch._foreach_add_(buffers, update.grads)
    update.decay()
    torch._foreach_add_(update.params, buffers, alpha=-update.group["lr"])


def natural_scales(squared: Tensor, sizes: Tensor, rho: Tensor, spread: Tensor, damping: float) -> Tensor:
    """`natural_step` of layers ``[L]`` with ``sizes`` entries each, 0 for layers without a gradient.

    A trust region bounds it: before momentum, no update has a root mean square above lr.
    """
    # A layer that never measured rho has a plain gradient; it steps as with rho = 1.
    rho = rho.to(squared).nan_to_num(nan=1.0)
    scales = natural_step(rho, spread.to(squared), squared, damping)
    scales = torch.minimum(scales, sizes.sqrt() / squared.sqrt())
    # Finite in the gradients' dtype, where a gradient is subnormal.
    return torch.where(squared > 0, scales, 0.0).clamp(max=torch.finfo(torch.float32).max)


def scaled_gradients(grads: Sequence[Tensor], layers: Sequence[int], scales: Tensor) -> list[Tensor]:
    """Gradients times the factor ``scales[layer]`` of their layer; half precision may not hold the factor itself."""
    factors = scales.unbind()
    wide = [g.to(accumulation_dtype(g.dtype)) for g in grads]
    return [(x * factors[layer].to(x)).to(g.dtype) for x, g, layer in zip(wide, grads, layers, strict=True)]
