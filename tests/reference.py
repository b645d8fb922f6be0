"""The oracle: FNGD from its definitions, dense, in float64, one sample at a time. Shares no code with hf_fngd.

Symbols as in the paper (arXiv 2403.03473): U [P, N] holds the per-sample gradients of the P parameters of one
layer, F = U U^T / N is the Fisher matrix, K = U^T U / N the Gram matrix, g the mean of U's columns.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

SampleLoss = Callable[[nn.Module, int], Tensor]


def per_sample_gradients(model: nn.Module, parameters: Sequence[Tensor], loss: SampleLoss, samples: int) -> Tensor:
    """U ``[P, N]``: sample n runs through the model alone, its loss is ``loss(model, n)``."""
    columns = []
    for n in range(samples):
        gradients = torch.autograd.grad(loss(model, n), parameters)
        columns.append(torch.cat([gradient.flatten() for gradient in gradients]).double())
    return torch.stack(columns, dim=1)


@dataclass
class Dense:
    """Everything that follows from U and the damping alpha, by dense linear algebra.

    Attributes:
        lam: ``alpha ||K||_F`` (Eq. 14).
        lam_prime: ``N / (1^T (K + lambda I)^-1 1)``.
        w: ``lambda' (K + lambda I)^-1 1`` (Eq. 9).
        p: ``sum_n w_n u_n / N``.
        rho: ``||K||_F / ||p||^2``.
    """

    u: Tensor
    alpha: float
    k: Tensor = field(init=False)
    lam: Tensor = field(init=False)
    lam_prime: Tensor = field(init=False)
    w: Tensor = field(init=False)
    p: Tensor = field(init=False)
    rho: Tensor = field(init=False)

    def __post_init__(self) -> None:
        samples = self.u.shape[1]
        ones = torch.ones(samples, dtype=self.u.dtype)
        self.k = self.u.t() @ self.u / samples
        self.lam = self.alpha * torch.linalg.matrix_norm(self.k)
        solution = torch.linalg.solve(self.k + self.lam * torch.eye(samples, dtype=self.u.dtype), ones)
        self.lam_prime = samples / solution.sum()
        self.w = self.lam_prime * solution
        self.p = self.u @ self.w / samples
        self.rho = torch.linalg.matrix_norm(self.k) / self.p.square().sum()

    def natural_gradient(self) -> Tensor:
        """``lambda' (F + lambda I)^-1 g`` with the dense Fisher matrix."""
        size, samples = self.u.shape
        fisher = self.u @ self.u.t() / samples
        gradient = self.u.mean(dim=1)
        damped = fisher + self.lam * torch.eye(size, dtype=self.u.dtype)
        return self.lam_prime * torch.linalg.solve(damped, gradient)


def gram_from_layer(a: Tensor, g: Tensor, bias: bool) -> Tensor:
    """K of inputs ``[N, T, i]`` and output gradients ``[N, T, o]``: h_n a sample at a time, then all products."""
    samples = a.shape[0]
    rows = []
    for n in range(samples):
        h = sum(torch.outer(g[n, t], a[n, t]) for t in range(a.shape[1]))
        row = [h.flatten(), g[n].sum(dim=0)] if bias else [h.flatten()]
        rows.append(torch.cat(row).double())
    return torch.tensor([[samples * float(x @ y) for y in rows] for x in rows], dtype=torch.float64)


# A whole run ---------------------------------------------------------------------------------------------


def mean_one(w: Tensor) -> Tensor:
    """The weights at mean 1: divided by their mean down to 0.5, beyond that doubled and shifted."""
    mean = float(w.mean())
    return w / mean if mean >= 0.5 else 2 * w + 1 - 2 * mean


def replay_fit(w: Tensor, size: int) -> Tensor:
    """Weights of a batch for a batch of another size: in order, again from the first where they run out."""
    return mean_one(torch.tensor([float(w[n % len(w)]) for n in range(size)], dtype=torch.float64))


def ranked_fit(w: Tensor, size: int) -> Tensor:
    """Weights in rank order for another number of ranks, linear between the mid-quantiles, constant beyond."""
    places = (np.arange(size) + 0.5) / size
    return mean_one(torch.from_numpy(np.interp(places, (np.arange(len(w)) + 0.5) / len(w), w.numpy())))


class ReplayStore:
    """The first epoch's weights, batch after batch, again in every later epoch."""

    def __init__(self) -> None:
        self.rows: dict[int, Tensor] = {}

    def put(self, place: int, w: Tensor, norms: Tensor) -> None:
        self.rows[place] = w

    def get(self, place: int, norms: Tensor) -> Tensor:
        return replay_fit(self.rows[place % len(self.rows)], len(norms))


class RankedStore:
    """The latest weights; the k-th smallest of a batch's norms takes the weight of the k-th smallest before.

    Batches of less than half the first one's size do not count.
    """

    def __init__(self) -> None:
        self.ranks: Tensor | None = None

    def put(self, place: int, w: Tensor, norms: Tensor) -> None:
        ranked = torch.tensor([float(w[n]) for n in norms.argsort()], dtype=torch.float64)
        if self.ranks is None:
            self.ranks = ranked
        elif 2 * len(ranked) >= len(self.ranks):
            self.ranks = ranked_fit(ranked, len(self.ranks))

    def get(self, place: int, norms: Tensor) -> Tensor:
        ranked = ranked_fit(self.ranks, len(norms))
        w = torch.empty_like(ranked)
        for rank, n in enumerate(norms.argsort()):
            w[n] = ranked[rank]
        return w


STORES = {"replay": ReplayStore, "ranked": RankedStore}


@dataclass
class SlowLayer:
    """What a run keeps of one preconditioned layer."""

    module: nn.Module
    store: ReplayStore | RankedStore
    log_rho: float = math.nan
    log_spread: float = math.nan
    squared_norm: float = math.nan


def newest(average: float, value: float) -> float:
    """The running mean after another value."""
    return value if math.isnan(average) else 0.8 * average + 0.2 * value


def run(
    model: nn.Module,
    layers: Iterable[str],
    batches: Sequence[tuple[Tensor, Tensor]],
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor],
    *,
    epoch: int,
    lr: float,
    momentum: float,
    damping: float,
    weight_decay: float,
    sharing: str,
    refresh: int,
    step_scale: str,
    fallback_lr: float,
) -> list[list[Tensor]]:
    """FNGD(update="momentum", fallback="sgd") on a copy of the model.

    Args:
        model: a plain module.
        layers: names of the layers to precondition.
        batches: inputs and labels of each step.
        loss: of a model, inputs and labels; the mean over the samples.
        epoch: steps an epoch.
        lr: and all others: FNGD's arguments.

    Returns:
        The parameters after each step.
    """
    model = copy.deepcopy(model)
    state = [SlowLayer(model.get_submodule(name), STORES[sharing]()) for name in layers]
    buffers = {p: torch.zeros_like(p) for p in model.parameters()}
    owners = {p: layer for layer in state for p in layer.module.parameters()}
    trajectory = []
    for step, (x, y) in enumerate(batches):
        since = step - epoch
        computes = since < 0 or (refresh > 0 and since % refresh == refresh - 1)
        gradients, u, norms = _measure(model, state, x, y, loss)
        scales = {}
        for layer in state:
            exact = Dense(u[id(layer)], damping)
            samples = len(x)
            if computes:
                w, rho, spread = exact.w, exact.rho, float(exact.w.square().mean())
                layer.store.put(step % epoch, w, norms[id(layer)])
                # Later steps use running geometric means, which the newest enter with 0.2.
                layer.log_rho = newest(layer.log_rho, float(rho.log()))
                layer.log_spread = newest(layer.log_spread, math.log(spread))
            else:
                w = layer.store.get(step % epoch, norms[id(layer)])
                rho, spread = math.exp(layer.log_rho), math.exp(layer.log_spread)
            p = u[id(layer)] @ w / samples
            squared = float(p.square().sum())
            offset = 0
            for parameter in layer.module.parameters():
                gradients[parameter] = p[offset : offset + parameter.numel()].view_as(parameter)
                offset += parameter.numel()
            if step_scale == "ngd":
                # lambda' in any step: ||p||^2 + lambda mean(w^2), with lambda = alpha rho ||p||^2.
                lam = damping * rho * squared
                natural = 1 / (squared + lam * spread)
                scale = min(natural, math.sqrt(len(p) / squared))
            else:
                before = squared if math.isnan(layer.squared_norm) else layer.squared_norm
                layer.squared_norm = 0.95 * before + 0.05 * squared
                scale = math.sqrt(len(p)) / math.sqrt(rho * layer.squared_norm)
            scales[id(layer)] = float(scale)
        with torch.no_grad():
            for parameter, buffer in buffers.items():
                owner = owners.get(parameter)
                rate = fallback_lr if owner is None else lr
                factor = 1.0 if owner is None else scales[id(owner)]
                buffer.mul_(momentum).add_(factor * gradients[parameter])
                decay = weight_decay if owner is not None and parameter.dim() > 1 else 0.0
                parameter.sub_(rate * decay * parameter).sub_(rate * buffer)
        trajectory.append([p.detach().clone() for p in model.parameters()])
    return trajectory


def _measure(
    model: nn.Module,
    state: Sequence[SlowLayer],
    x: Tensor,
    y: Tensor,
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor],
) -> tuple[dict[Tensor, Tensor], dict[int, Tensor], dict[int, Tensor]]:
    """The batch gradients, and for every layer (by id) U and ``||a_n|| ||g_n||``, a bias being one more input of 1."""
    parameters = list(model.parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(loss(model, x, y), parameters), strict=True))
    u, norms = {}, {}
    for layer in state:
        caught: list[tuple[Tensor, Tensor]] = []
        handle = layer.module.register_forward_hook(
            lambda _, args, output, caught=caught: caught.append((args[0], output))
        )
        columns, products = [], []
        for n in range(len(x)):
            caught.clear()
            alone = loss(model, x[n : n + 1], y[n : n + 1])
            a, output = caught[0]
            *of_parameters, g = torch.autograd.grad(alone, [*layer.module.parameters(), output])
            columns.append(torch.cat([gradient.flatten() for gradient in of_parameters]))
            if len(of_parameters) == 2:
                a = torch.cat([a, torch.ones_like(a[..., :1])], dim=-1)
            products.append(float(torch.linalg.vector_norm(a.detach()) * torch.linalg.vector_norm(g)))
        handle.remove()
        u[id(layer)] = torch.stack(columns, dim=1)
        norms[id(layer)] = torch.tensor(products, dtype=torch.float64)
    return gradients, u, norms
