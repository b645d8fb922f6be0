"""Update rules: free functions on lists of tensors, and the table that names them.

Every function updates ``params`` and its state in place, by multi-tensor operations, with decoupled weight
decay (Loshchilov & Hutter 2019): ``p <- p (1 - lr weight_decay)``. ``lr`` is in units of the parameter for
"adam" and "muon", whose updates are scale-free, and multiplies the gradient as it comes for "momentum".
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from hf_fngd.sharded import part, whole

Tensors = list[Tensor]

# Quintic Newton-Schulz iteration of Muon (Jordan et al. 2024): maps singular values in (0, 1] to about 1.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5
# Root mean square of an orthogonalized update, that of a typical AdamW step (Liu et al. 2025, Sec. 2.2).
_MUON_RMS = 0.2
# The most that the matrices take which are orthogonalized together: beyond, larger products are no faster.
_MUON_BYTES = 2**28
# Devices for which torch has fused kernels of Adam in all versions that this package runs with.
_FUSED = ("cpu", "cuda")


@dataclass(frozen=True)
class Settings:
    """What a parameter group says of its rule; each rule reads what it needs."""

    lr: float
    momentum: float
    beta2: float
    eps: float
    weight_decay: float


class Rule(Protocol):
    """The signature that all rules share."""

    def __call__(
        self,
        params: Tensors,
        grads: Tensors,
        state: Sequence[Tensors],
        steps: Sequence[int],
        settings: Settings,
        sharded: Sequence[Tensor],
        /,
    ) -> None:
        """Do one update in place.

        Args:
            params: this process's parts of ``sharded`` under FSDP2, otherwise the same as those.
            grads: their gradients.
            state: one list of tensors for each name of the rule.
            steps: counts each parameter's updates, this one included.
            settings: of the group.
            sharded: the parameters themselves.
        """


def momentum_update(
    params: Tensors, grads: Tensors, state: Sequence[Tensors], steps: Sequence[int], settings: Settings, _: Any
) -> None:
    """Heavy-ball momentum as in torch's SGD: ``m <- momentum m + g``, ``p <- p - lr m``."""
    (buffers,) = state
    torch._foreach_mul_(buffers, settings.momentum)
    torch._foreach_add_(buffers, grads)
    _decay(params, settings)
    torch._foreach_add_(params, buffers, alpha=-settings.lr)


def adam_update(
    params: Tensors, grads: Tensors, state: Sequence[Tensors], steps: Sequence[int], settings: Settings, _: Any
) -> None:
    """Adam (Kingma & Ba 2015) with decoupled weight decay, torch's; ``momentum`` is its beta1."""
    means, squares = state
    counts = {device: _counts(steps, device) for device in {p.device for p in params}}
    adamw(
        params,
        grads,
        means,
        squares,
        max_exp_avg_sqs=[],
        state_steps=[counts[p.device][place] for place, p in enumerate(params)],
        fused=all(p.device.type in _FUSED for p in params),  # a third of the time of the others on a CPU
        amsgrad=False,
        beta1=settings.momentum,
        beta2=settings.beta2,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        eps=settings.eps,
        maximize=False,
    )


def muon_update(
    params: Tensors,
    grads: Tensors,
    state: Sequence[Tensors],
    steps: Sequence[int],
    settings: Settings,
    sharded: Sequence[Tensor],
) -> None:
    """Orthogonalized Nesterov momentum (Muon, Jordan et al. 2024), scaled to a root mean square of 0.2 lr.

    The scale lets one learning rate serve matrices of any shape and AdamW on the parameters beside them. Matrices of
    equal shapes are orthogonalized together, as many as `_MUON_BYTES` hold; under FSDP2 every process gathers these,
    and orthogonalizes all of them.
    """
    (buffers,) = state
    torch._foreach_lerp_(buffers, grads, 1 - settings.momentum)
    _decay(params, settings)
    kinds = [(p.shape, d.dtype, d.device) for p, d in zip(sharded, grads, strict=True)]
    for shape, dtype, device in dict.fromkeys(kinds):
        alike = [place for place, own in enumerate(kinds) if own == (shape, dtype, device)]
        working = _working_dtype(dtype, device)
        some = max(1, _MUON_BYTES // (shape.numel() * working.itemsize))
        for members in (alike[start : start + some] for start in range(0, len(alike), some)):
            parts = torch._foreach_lerp([grads[m] for m in members], [buffers[m] for m in members], settings.momentum)
            directions = [whole(d.to(working), sharded[m]) for d, m in zip(parts, members, strict=True)]
            updates = orthogonalize(torch.stack(directions)).to(dtype)
            torch._foreach_add_(
                [params[m] for m in members],
                [part(u, sharded[m]).to(device) for u, m in zip(updates.unbind(), members, strict=True)],
                alpha=-settings.lr * _MUON_RMS * max(shape) ** 0.5,
            )


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring the singular values of each matrix ``[B, rows, columns]`` near 1 by Newton-Schulz iterations.

    Runs in bfloat16 where a CUDA device has units for it, which is enough and fastest, and in float32 or float64
    elsewhere.
    """
    x = matrices.to(_working_dtype(matrices.dtype, matrices.device))
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    # First by the largest entry: squares of very small or large gradients leave the range.
    tiny = torch.finfo(x.dtype).tiny
    x = x / x.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=tiny)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=tiny)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def _working_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    if dtype != torch.float64 and device.type == "cuda" and _has_bfloat16(device):
        return torch.bfloat16
    return torch.promote_types(dtype, torch.float32)


@functools.cache
def _has_bfloat16(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)  # emulated before


def _counts(steps: Sequence[int], device: torch.device) -> Sequence[Tensor]:
    """Counters for torch's Adam, which counts this update itself; without a copy from the host where they agree."""
    if len(set(steps)) == 1:
        return torch.full((len(steps),), steps[0] - 1.0, device=device).unbind()
    return torch.tensor([step - 1.0 for step in steps]).to(device).unbind()


def _decay(params: Tensors, settings: Settings) -> None:
    if settings.weight_decay:
        torch._foreach_mul_(params, 1 - settings.lr * settings.weight_decay)


@dataclass(frozen=True)
class UpdateRule:
    """A rule and the names of the state tensors, shaped like the parameter, that it wants."""

    update: Rule
    state: tuple[str, ...]


RULES: dict[str, UpdateRule] = {
    "momentum": UpdateRule(momentum_update, ("momentum_buffer",)),
    "adam": UpdateRule(adam_update, ("exp_avg", "exp_avg_sq")),
    "muon": UpdateRule(muon_update, ("momentum_buffer",)),
}

# The names that the argument `fallback` gives to two of them.
FALLBACK_RULES: dict[str, str] = {"adamw": "adam", "sgd": "momentum"}
