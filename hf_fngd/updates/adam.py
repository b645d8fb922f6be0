"""``adam``: Adam (Kingma & Ba 2015) with decoupled weight decay, by torch's own fused kernel."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from hf_fngd.updates.base import Update, register_rule


@register_rule("adam", "exp_avg", "exp_avg_sq", reads=("beta2", "eps"))
def adam_update(update: Update) -> None:
    """``m <- b1 m + (1 - b1) g``, ``v <- b2 v + (1 - b2) g^2``, ``p <- p - lr m' / (sqrt(v') + eps)``.

    b1 is ``momentum``, m' and v' are m and v over one minus their decay to the power of the step.
    """
    params, group, (means, squares) = update.params, update.group, update.state
    counts = {device: _counts(update.steps, device) for device in {p.device for p in params}}
    adamw(
        params,
        update.grads,
        means,
        squares,
        max_exp_avg_sqs=[],
        state_steps=[counts[p.device][place] for place, p in enumerate(params)],
        # Every supported torch has fused kernels for these devices; on a CPU they take a third of the time.
        fused=all(
            together[0].device.type in ("cpu", "cuda") and _alike(together)
            for together in zip(params, update.grads, means, squares, strict=True)
        ),
        amsgrad=False,
        beta1=group["momentum"],
        beta2=group["beta2"],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _alike(tensors: Sequence[Tensor]) -> bool:
    """Whether the tensors have the same layout in memory, without gaps, as torch's fused kernel assumes."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return True
    strides = {tensor.stride() for tensor in tensors}
    return len(strides) == 1 and torch.empty_like(tensors[0]).stride() in strides


def _counts(steps: Sequence[int], device: torch.device) -> Sequence[Tensor]:
    """Step counters for torch's Adam, before this update; if they agree, nothing is copied from the host."""
    if len(set(steps)) == 1:
        return torch.full((len(steps),), steps[0] - 1.0, device=device).unbind()
    return torch.tensor([step - 1.0 for step in steps]).to(device).unbind()
