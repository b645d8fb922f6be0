"""How large the gradients are: the norms that the finite check, the paper's step and the logs read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_fngd.distributed.sharded import local, sum_over_parts

Groups = Sequence[dict[str, Any]]

# A gradient norm below which float32 squares lose digits.
_FAINT = 1e-15


def squared_norms(groups: Groups) -> Tensor | None:
    """``||p||^2`` of every parameter's gradient, in the groups' order ``[P]``, 0 where there is none.

    None where no parameter has a gradient. A collective under FSDP2.
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
    """From `squared_norms` of the same groups to L layers: ``||p||^2``, and the number of entries that have a gradient.

    ``layers`` in the groups says which layer a parameter belongs to. Both are ``[L]``.
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
