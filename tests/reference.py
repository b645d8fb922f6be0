"""The oracle: FNGD from its definitions, dense, in float64, one sample at a time. Shares no code with hf_fngd.

Symbols as in the paper (arXiv 2403.03473): U [P, N] holds the per-sample gradients of the P parameters of one
layer, F = U U^T / N is the Fisher matrix, K = U^T U / N the Gram matrix, g the mean of U's columns.
"""

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

SampleLoss = Callable[[nn.Module, int], Tensor]


class _Float64(TorchFunctionMode):
    """Asks for float64 wherever a model asks for float32, as RMS norms, softmaxes and losses do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = [torch.float64 if arg is torch.float32 else arg for arg in args]
        kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


@contextlib.contextmanager
def float64() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64():
            yield
    finally:
        torch.set_default_dtype(default)


def per_sample_gradients(model: nn.Module, parameters: Sequence[Tensor], loss: SampleLoss, samples: int) -> Tensor:
    """U ``[P, N]``: sample n runs through the model alone, its loss is ``loss(model, n)``."""
    columns = []
    for n in range(samples):
        gradients = torch.autograd.grad(loss(model, n), parameters)
        columns.append(torch.cat([gradient.flatten() for gradient in gradients]).double())
    return torch.stack(columns, dim=1)


class Dense:
    """Everything that follows from U and the damping alpha, by dense linear algebra.

    Attributes:
        lam: ``alpha ||K||_F`` (Eq. 14).
        lam_prime: ``N / (1^T (K + lambda I)^-1 1)``.
        w: ``lambda' (K + lambda I)^-1 1`` (Eq. 9).
        p: ``sum_n w_n u_n / N``.
        rho: ``||K||_F / ||p||^2``.
    """

    def __init__(self, u: Tensor, alpha: float) -> None:
        self.u, samples = u, u.shape[1]
        self.k = u.t() @ u / samples
        self.lam = alpha * torch.linalg.matrix_norm(self.k)
        damped = self.k + self.lam * torch.eye(samples, dtype=u.dtype)
        solution = torch.linalg.solve(damped, torch.ones(samples, dtype=u.dtype))
        self.lam_prime = samples / solution.sum()
        self.w = self.lam_prime * solution
        self.p = u @ self.w / samples
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


# Sample clipping -----------------------------------------------------------------------------------------


@dataclass
class Use:
    """One call of a module in the forward pass of one sample.

    Attributes:
        norm: of the sample's gradient, by the bound of the module's type.
        gradients: its part of each parameter's gradient, flat, by the parameter's name.
    """

    norm: float
    gradients: dict[str, Tensor]


def norm_of(module: nn.Module, a: Tensor, g: Tensor, gradients: Sequence[Tensor], ones: bool, tied: bool) -> float:
    """The bound of the norm of a sample's gradient.

    Args:
        module: the module.
        a: its input.
        g: its output gradient.
        gradients: those of its parameters.
        ones: whether it has a trained bias, for which a linear layer's input has one more feature.
        tied: whether it shares its weight.
    """
    if isinstance(module, nn.Embedding | nn.LayerNorm) or (tied and isinstance(module, nn.Linear)):
        return float(g.norm())
    if isinstance(module, nn.Linear | Conv1D):
        of_a = (a.double().square().sum(-1) + ones).sqrt().flatten()
        return float(of_a @ g.double().flatten(0, -2).norm(dim=1))
    if isinstance(module, _ConvNd):
        if module.padding_mode != "zeros":
            a = F.pad(a, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        bias = ones * g[0, 0].numel() * math.prod(module.stride) / math.prod(module.kernel_size)
        of_a = (a.flatten(1).square().sum(dim=1) + bias).sqrt()
        return float(of_a @ g.flatten(1).norm(dim=1))
    return float(gradients[0].norm())  # a norm that multiplies by one vector


def _catch(
    caught: list[tuple[str, nn.Module, Tensor, Tensor]], name: str, module: nn.Module, args: Any, kwargs: Any, y: Any
) -> Any:
    """A forward hook. The model goes on with a copy of the output, which it may change in place."""
    caught.append((name, module, (*args, *kwargs.values())[0].detach(), y))
    return y.clone() if isinstance(y, Tensor) else None


def uses_of(
    model: nn.Module, modules: Iterable[str], alone: SampleLoss, n: int, trained: Collection[str]
) -> dict[tuple[str, int], Use]:
    """The calls of modules in the forward pass of sample n, by name and number.

    Args:
        model: a plain module.
        modules: names of modules.
        alone: the loss of a sample that runs through the model alone.
        n: the sample.
        trained: names of the parameters that are trained.
    """
    names = {id(p): name for name, p in model.named_parameters() if name in trained}
    tables = [name for name in modules if not hasattr(model.get_submodule(name), "weight")]
    owners = [id(p) for module in model.modules() for p in module.parameters(recurse=False)]
    caught: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    handles = [
        model.get_submodule(name).register_forward_hook(
            functools.partial(_catch, caught, name),
            with_kwargs=True,
        )
        for name in modules
        if name not in tables
    ]
    value = alone(model, n)
    for handle in handles:
        handle.remove()
    grads = torch.autograd.grad(value, [output for *_, output in caught], allow_unused=True, retain_graph=True)
    found: dict[tuple[str, int], Use] = {}
    for name in tables:  # of parameters, each of which is clipped by itself
        for p in model.get_submodule(name).parameters(recurse=False):
            (g,) = torch.autograd.grad(value, p, retain_graph=True)
            found[names[id(p)], 0] = Use(float(g.norm()), {names[id(p)]: g.flatten()})
    for (name, module, a, _), g in zip(caught, grads, strict=True):
        if g is None:
            continue
        own = [p for p in module.parameters(recurse=False) if id(p) in names]
        gradients = torch.autograd.grad(module(a), own, g)
        ones = any(p is getattr(module, "bias", None) for p in own)
        norm = norm_of(module, a, g, gradients, ones, owners.count(id(module.weight)) > 1)
        call = sum(other == name for other, _ in found)
        parts = zip(own, gradients, strict=True)
        found[name, call] = Use(norm, {names[id(p)]: gradient.flatten() for p, gradient in parts})
    return found


@dataclass
class Clipping:
    """What ``sharing="clipped"`` knows of a step's other micro-batches: those of the last step.

    Attributes:
        parts: how many micro-batches a step has.
        means: mean norms of the last step that had as many, by module; of those alone that are called once.
        shorter: whether the last step had fewer; a second one counts.
    """

    parts: int = 1
    means: dict[str, float] = field(default_factory=dict)
    shorter: bool = False

    def gradients(
        self, samples: Sequence[Mapping[tuple[str, int], Use]], factor: float = 1.0
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The clipped gradients of a micro-batch, flat, by parameter; and its norms by module.

        Args:
            samples: the calls of each sample.
            factor: by which their losses are multiplied in the micro-batch's.
        """
        found: dict[str, Tensor] = {}
        norms: dict[str, Tensor] = {}
        for module, call in samples[0]:
            uses = [sample[module, call] for sample in samples]
            of_call = factor * torch.tensor([use.norm for use in uses], dtype=torch.float64)
            norms[module] = of_call if call == 0 else torch.zeros_like(of_call)
            bound = float(of_call.sum() / max(1, int(of_call.count_nonzero())))
            if self.means.get(module):
                bound = (bound + (self.parts - 1) * self.means[module]) / self.parts
            w = torch.where(of_call > 0, bound / of_call, 1).clamp(max=1)
            for name in uses[0].gradients:
                own = factor * torch.stack([use.gradients[name].double() for use in uses], dim=1) @ w
                found[name] = found[name] + own if name in found else own
        return found, norms

    def close(self, norms: Sequence[Mapping[str, Tensor]]) -> None:
        """A step is over: its micro-batches' norms."""
        if len(norms) < self.parts and not self.shorter:
            self.shorter = True
            return
        self.parts, self.shorter = len(norms), False
        for module in {module for batch in norms for module in batch}:
            own = torch.cat([batch[module] for batch in norms if module in batch])
            if own.any():
                self.means[module] = float(own.sum() / own.count_nonzero())


# A whole run ---------------------------------------------------------------------------------------------


def mean_one(w: Tensor) -> Tensor:
    """The weights at mean 1: divided by their mean down to 0.5, beyond that doubled and shifted."""
    mean = float(w.mean())
    return w / mean if mean >= 0.5 else 2 * w + 1 - 2 * mean


def replay_fit(w: Tensor, size: int) -> Tensor:
    """Weights of a batch for a batch of another size: in order, again from the first where they run out."""
    return mean_one(torch.tensor([float(w[n % len(w)]) for n in range(size)], dtype=torch.float64))


class ReplayStore:
    """The first epoch's weights, batch after batch, again in every later epoch."""

    def __init__(self) -> None:
        self.rows: dict[int, Tensor] = {}

    def put(self, place: int, w: Tensor) -> None:
        self.rows[place] = w

    def get(self, place: int, size: int) -> Tensor:
        return replay_fit(self.rows[place % len(self.rows)], size)


@dataclass
class SlowLayer:
    """What a run keeps of one preconditioned layer."""

    parameters: list[nn.Parameter]
    store: ReplayStore = field(default_factory=ReplayStore)
    log_rho: float = math.nan
    log_spread: float = math.nan


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
    coefficient_steps: int | None = None,
    fallback_lr: float,
) -> list[list[Tensor]]:
    """FNGD(update="momentum", fallback="sgd") on a copy of the model, with sharing "never" or "replay".

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
    state = [SlowLayer(list(model.get_submodule(name).parameters())) for name in layers]
    buffers = {p: torch.zeros_like(p) for p in model.parameters()}
    owners = {p: layer for layer in state for p in layer.parameters}
    first = min(epoch, coefficient_steps or epoch)
    trajectory = []
    for step, (x, y) in enumerate(batches):
        # Places count from the beginning of the epoch, or of the shared steps.
        place = (step - first if first <= step < epoch else step) % epoch

        def alone(model: nn.Module, n: int, x: Tensor = x, y: Tensor = y) -> Tensor:
            return loss(model, x[n : n + 1], y[n : n + 1])

        parameters = list(model.parameters())
        gradients = dict(zip(parameters, torch.autograd.grad(loss(model, x, y), parameters), strict=True))
        scales = {}
        for layer in state:
            exact = Dense(per_sample_gradients(model, layer.parameters, alone, len(x)), damping)
            if sharing == "never" or step < first:
                w, rho, spread = exact.w, float(exact.rho), float(exact.w.square().mean())
                layer.store.put(place, w)
                # Later steps use running geometric means, which the newest enter with 0.2.
                layer.log_rho = newest(layer.log_rho, math.log(rho))
                layer.log_spread = newest(layer.log_spread, math.log(spread))
            else:
                w = layer.store.get(place, len(x))
                rho, spread = math.exp(layer.log_rho), math.exp(layer.log_spread)
            p = exact.u @ w / len(x)
            squared = float(p.square().sum())
            for parameter, part in zip(layer.parameters, p.split([p.numel() for p in layer.parameters]), strict=True):
                gradients[parameter] = part.view_as(parameter)
            # lambda' in any step: ||p||^2 + lambda mean(w^2), with lambda = alpha rho ||p||^2.
            natural = 1 / (squared + damping * rho * squared * spread)
            scales[id(layer)] = min(natural, math.sqrt(len(p) / squared))
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
