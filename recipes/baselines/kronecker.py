"""What KFAC and Eva share: statistics of a layer's inputs and output gradients, momentum, and the size of a step.

Layout: a layer's inputs `a [M, i]` and output gradients `g [M, o]`, one row a position (every token of every
sample) that is no padding, g of a loss that is a mean, so that the gradients of single positions are M g. Gradients of
weights are `[o, i]`; that of a Conv1D is transposed on the way in and out. A Conv2d's inputs are the patches that its
filter sees at each position, `i` the entries of one (Grosse & Martens 2016), and its filter is flattened.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D


class KroneckerOptimizer(Optimizer):
    """SGD with momentum on a preconditioned gradient, within a trust region.

    The step is scaled down where `lr^2 sum_l <p_l, g_l>`, about twice the KL divergence that it makes, is above
    `kl_clip` (Ba et al. 2017, Sec. 5): by the root of the ratio. Weight decay is decoupled. Statistics are sums over
    all micro-batches of a step. The model has to be trained by one process and without loss scaling.

    Args:
        groups: Parameter groups of the layers' weights.
        layers: The layers.
        lr: Learning rate.
        **options: What replaces `options`: momentum, of the preconditioned gradients; damping, gamma, which is added to
            the curvature; decay, of the running averages of the statistics; kl_clip, kappa, the bound of the trust
            region; statistics_every, steps between two statistics; and a subclass's own.

    Raises:
        ValueError: There are several processes, whose statistics would drift apart; the damping is not positive; or a
            convolution pads with something else than zeros.
    """

    averages: tuple[str, str]
    """The names in the state of the two running averages."""
    options: ClassVar[dict[str, Any]] = {"momentum": 0.9, "decay": 0.95, "kl_clip": 0.001}
    """The options and their defaults; subclasses add those of damping and statistics_every."""

    def __init__(self, groups: list[dict[str, Any]], layers: Sequence[nn.Module], *, lr: float, **options: Any) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise ValueError(f"{type(self).__name__} of this recipe is for one process.")
        if unknown := options.keys() - self.options.keys():
            raise TypeError(f"{type(self).__name__} has no options {', '.join(sorted(unknown))}.")
        options = self.options | options
        if options["damping"] <= 0:
            raise ValueError(f"damping is {options['damping']}; it must be positive.")
        super().__init__(groups, options | {"lr": lr, "weight_decay": 0.0, "steps": 0})
        self._sums: dict[Tensor, list[Any]] = {}
        self._layers = {layer.weight: layer for layer in layers}
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                check_padding(layer)
            layer.register_forward_hook(self._watch)

    @abstractmethod
    def statistics(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return two sums over the rows."""

    @abstractmethod
    def update(
        self, state: dict[str, Any], sums: tuple[Tensor, Tensor], rows: Tensor, samples: Any, group: dict[str, Any]
    ) -> None:
        """Bring the sums of a step, over all of its rows, into the running averages; the loss is a mean over samples.

        Of a Linear every row is a sample, of a convolution an image.
        """

    @abstractmethod
    def precondition(self, state: dict[str, Any], grad: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the direction `[o, i]` for a gradient `[o, i]`."""

    def _watch(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        group = self.param_groups[0]
        wanted = group["steps"] % group["statistics_every"] == 0
        if wanted and layer.training and output.requires_grad:
            output.register_hook(partial(self._collect, layer, inputs[0].detach()))

    @torch.no_grad()
    def _collect(self, layer: nn.Module, a: Tensor, g: Tensor) -> None:
        samples = None
        if isinstance(layer, nn.Conv2d):
            samples, a, g = len(a), patches(layer, a), g.flatten(2).mT
        a, g = (x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32)) for x in (a, g))
        used = g.any(-1, keepdim=True)  # padding has no gradient, and no place in the statistics of the inputs
        rows = used.sum().clamp(min=1)
        sums = self._sums.setdefault(layer.weight, [0.0, 0.0, 0, 0])
        for place, value in enumerate((*self.statistics(a * used, g), rows, rows if samples is None else samples)):
            sums[place] = sums[place] + value

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the statistics that backward collected, and the parameters."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        directions: dict[Tensor, Tensor] = {}
        size = torch.zeros(())
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if p in self._sums:
                    *sums, rows, samples = self._sums[p]
                    self.update(state, tuple(sums), rows, samples, group)
                transposed = isinstance(self._layers[p], Conv1D)
                grad = p.grad.mT if transposed else p.grad.flatten(1)
                direction = self.precondition(state, grad, group) if self.averages[0] in state else grad
                directions[p] = direction.mT if transposed else direction.reshape(p.shape)
                size = size.to(p.device) + group["lr"] ** 2 * (directions[p] * p.grad).sum()
        self._sums.clear()
        for group in self.param_groups:
            scale = (group["kl_clip"] / size.clamp(min=torch.finfo(size.dtype).tiny)).sqrt().clamp(max=1)
            for p in group["params"]:
                if p in directions:
                    state = self.state[p]
                    buffer = state.setdefault("momentum_buffer", torch.zeros_like(p))
                    buffer.mul_(group["momentum"]).add_(directions[p] * scale)
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(buffer, alpha=-group["lr"])
            group["steps"] += 1
        return loss


def patches(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Return what the filter sees of images `[N, i, *]` at each position: `[N, positions, i k k]`."""
    return F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT


def check_padding(layer: nn.Conv2d) -> None:
    """Raise a ValueError where `patches` cannot pad as the layer does."""
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        raise ValueError("KFAC and Eva of this recipe take convolutions whose padding is a number of zeros.")


def average(state: dict[str, Any], name: str, new: Tensor, decay: float) -> None:
    """Move a running average towards a new value, from which it starts."""
    if name in state:
        state[name].lerp_(new, 1 - decay)
    else:
        state[name] = new.clone()


def check_periods(statistics_every: int, inverse_every: int, **others: Any) -> None:
    """Raise a ValueError where inverses would be computed between two statistics."""
    if inverse_every % statistics_every:
        raise ValueError(f"statistics_every={statistics_every} does not divide inverse_every={inverse_every}.")
