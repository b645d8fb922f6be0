"""The norms of the gradients: the finite check, the paper's step and the logs read them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_fngd.distributed.sharded import local, sum_over_parts

Groups = Sequence[dict[str, Any]]


def real(x: Tensor) -> Tensor:
    """View a complex tensor as a real one, with the parts side by side; a real tensor stays as it is."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def squared_norms(groups: Groups, exact: bool = True) -> Tensor | None:
    """``||p||^2`` of each parameter's gradient ``[P]``, 0 without one; None if no parameter has one.

    A collective under FSDP2. Without ``exact`` the host does not wait for the device, and gradients below 1e-15 may
    count too little. Raises RuntimeError where a gradient is sparse.
    """
    params = [p for group in groups for p in group["params"]]
    live = [place for place, p in enumerate(params) if p.grad is not None]
    if not live:
        return None
    if sparse := [place for place in live if params[place].grad.layout != torch.strided]:
        name = [name for group in groups for name in group["param_names"]][sparse[0]]
        raise RuntimeError(f"FNGD takes no sparse gradients, as {name} has: build the embedding with sparse=False")
    norms = _norms([real(local(params[place].grad)) for place in live], exact)
    squared = sum_over_parts(norms.square(), [params[place] for place in live])
    if len(live) == len(params):
        return squared
    return squared.new_zeros(len(params)).index_copy(0, torch.tensor(live, device=squared.device), squared)


def of_layers(squared: Tensor, groups: Groups, layers: int) -> tuple[Tensor, Tensor]:
    """Sum `squared_norms` of the same groups up to layers ``[L]``; also, how many entries have a gradient."""
    # Groups of preconditioned layers come first and name each parameter's layer; the fallback's groups name none.
    owners = [layer for group in groups for layer in group["layers"]]
    params = [p for group in groups for p in group["params"]][: len(owners)]
    sizes = squared.new_tensor([0 if p.grad is None else p.numel() for p in params])
    totals = squared.new_zeros(2, layers)
    totals.index_add_(1, torch.tensor(owners, device=squared.device), torch.stack([squared[: len(owners)], sizes]))
    return totals[0], totals[1]


def _norms(grads: list[Tensor], exact: bool) -> Tensor:
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
    # Below this, squares in float32 lose digits. Float64 from the start would be many times slower on a CPU.
    for place, norm in enumerate(found.tolist() if exact else ()):
        if norm < 1e-15:
            found[place] = torch.linalg.vector_norm(grads[place], dtype=torch.float64)
    return found
