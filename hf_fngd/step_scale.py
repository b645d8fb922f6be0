"""How large the gradients are, and what update "momentum" makes of that: the scale of each layer's step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_fngd.coefficients import natural_step
from hf_fngd.sharded import local, sum_over_parts

Groups = Sequence[dict[str, Any]]

# Decay of the running mean of ||p||^2 in step_scale="rms".
_NORM_DECAY = 0.95
# A gradient norm below which float32 squares lose digits.
_FAINT = 1e-15


def squared_norms(groups: Groups) -> Tensor | None:
    """``||p||^2`` of every parameter's gradient, in the groups' order ``[P]``, 0 where there is none.

    A collective under FSDP2.

    Args:
        groups: an optimizer's parameter groups.

    Returns:
        None where no parameter has a gradient.
    """
    params = [p for group in groups for p in group["params"]]
    live = [place for place, p in enumerate(params) if p.grad is not None]
    if not live:
        return None
    norms = _norms([local(params[place].grad) for place in live])
    squared = sum_over_parts(norms.square(), [params[place] for place in live])
    if len(live) == len(params):
        return squared
    return squared.new_zeros(len(params)).index_copy(0, torch.tensor(live, device=squared.device), squared)


def usable(squared: Tensor) -> bool:
    """Whether gradients are finite, and stay so when an update rule squares them in float32. Waits for the device."""
    return bool(squared.sum() <= torch.finfo(torch.float32).max)


def of_layers(squared: Tensor, groups: Groups, layers: int) -> tuple[Tensor, Tensor]:
    """From parameters to layers: ``||p||^2``, and the number of entries that have a gradient, both ``[L]``.

    Args:
        squared: what `squared_norms` returned.
        groups: the same groups; ``layers`` in them says which layer a parameter belongs to.
        layers: L.
    """
    places, owners, counts, first = [], [], [], 0
    for group in groups:
        # The groups of the fallback have no layers.
        for place, (layer, p) in enumerate(zip(group["layers"], group["params"], strict=False), start=first):
            places.append(place)
            owners.append(layer)
            counts.append(0.0 if p.grad is None else float(p.numel()))
        first += len(group["params"])
    sizes = torch.tensor(counts, dtype=squared.dtype, device=squared.device)
    totals = squared.new_zeros(2, layers)
    totals.index_add_(1, torch.tensor(owners, device=squared.device), torch.stack([squared[places], sizes]))
    return totals[0], totals[1]


class StepScale:
    """The factor of a layer's gradient before momentum.

    Args:
        kind: ``"rms"`` or ``"ngd"``, as `hf_fngd.FNGD` has them.
        damping: alpha of Eq. 14.

    Attributes:
        norms: running means of ``||p||^2`` for "rms" ``[L]``; None before the first step.
    """

    def __init__(self, kind: str, damping: float) -> None:
        self.kind, self.damping = kind, damping
        self.norms: Tensor | None = None

    def __call__(self, squared: Tensor, sizes: Tensor, rho: Tensor, spread: Tensor) -> Tensor:
        """The factors of a step ``[L]``, 0 for layers without a gradient.

        Args:
            squared: ``||p||^2`` of the layers ``[L]``.
            sizes: numbers of entries ``[L]``.
            rho: noise ratios ``[L]``; NaN where a layer never measured one.
            spread: ``mean(w^2)`` ``[L]``.
        """
        # Without rho a layer gets a plain gradient; rho = 1 then makes lr the RMS of its update.
        rho = rho.to(squared).nan_to_num(nan=1.0)
        if self.kind == "ngd":
            scales = natural_step(rho, spread.to(squared), squared, self.damping)
            scales = torch.minimum(scales, sizes.sqrt() / squared.sqrt())
        else:
            # Trainer loads checkpoints to the CPU, and a layer without a gradient keeps its mean.
            known = squared if self.norms is None else self.norms.to(squared.device)
            known = torch.where(known == 0, squared, known)
            self.norms = torch.where(squared > 0, torch.lerp(squared, known, _NORM_DECAY), known)
            scales = sizes.sqrt() / (rho * self.norms).sqrt()
        # Finite in the gradients' dtype, where a gradient is subnormal.
        return torch.where(squared > 0, scales, 0.0).clamp(max=torch.finfo(torch.float32).max)


def _norms(grads: list[Tensor]) -> Tensor:
    """The 2-norms of tensors ``[P]``, in float64 where the device has it."""
    device = grads[0].device
    kinds = {grad.dtype for grad in grads}
    if kinds in ({torch.float32}, {torch.float64}):
        norms = torch._foreach_norm(grads)
    else:
        norms = torch._foreach_norm(grads, dtype=torch.float64 if torch.float64 in kinds else torch.float32)
    found = torch.stack([norm.to(device) for norm in norms])
    if device.type == "mps":
        return found
    found = found.double()
    # Squares of these vanish in float32; float64 from the start is many times slower on a CPU.
    for place in [place for place, norm in enumerate(found.tolist()) if norm < _FAINT]:
        found[place] = torch.linalg.vector_norm(grads[place], dtype=torch.float64)
    return found
