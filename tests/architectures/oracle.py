"""Every gradient of a family's model against the oracle, in float64, and what the coverage report says of it.

The sample weights are those of "never", and of "clipped" with every type of layer weighed.
"""

import contextlib
import copy
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_fngd import CoverageReport, FNGDPreconditioner
from hf_fngd.layers.base import find_kernel
from tests.architectures.registry import PRECONDITIONED, WEIGHED, Batch, Family
from tests.nets import settings_of
from tests.reference import Clipping, Dense, Use, float64, norm_of, uses_of

DAMPING = 0.03
# Where the weighted gradient is compared with the oracle, and the plain one with that of the plain model.
TOLERANCE, PLAIN_TOLERANCE = 1e-6, 1e-9

Size = tuple[int, int]
Gradients = dict[str, Tensor]


@dataclass
class Verdict:
    """What became of one trainable parameter.

    Attributes:
        outcome: `PRECONDITIONED`, `WEIGHED`, or the reason that the report gives.
        error: relative distance of ``p.grad`` from what the outcome promises.
        bound: largest error that is right.
        shift: relative distance of the weighted gradient from the plain one, where the outcome promises the former.
    """

    outcome: str
    error: float
    bound: float
    shift: float = 0.0

    @property
    def right(self) -> bool:
        return self.error < self.bound


def outcomes(report: CoverageReport) -> dict[str, str]:
    """All that the report says, by the name of the parameter."""
    taken = dict.fromkeys(report.preconditioned, PRECONDITIONED) | dict.fromkeys(report.weighed, WEIGHED)
    return taken | report.plain | report.missed


def verdicts(family: Family, *sizes: Size, sharing: str = "never") -> dict[str, Verdict]:
    """Run batches of these sizes, ``(samples, positions)``, and judge the last one's gradients.

    Raises:
        AssertionError: the oracle itself does not hold; the mean of its U is not the batch gradient.
    """
    plain = family.model()
    model = copy.deepcopy(plain)
    engine = FNGDPreconditioner(model, **settings_of(sharing, damping=DAMPING))
    for size in sizes:
        model.zero_grad()
        backward(model, family.batch(*size))
        with silent():
            engine.step()
    found = outcomes(engine.coverage())
    if sharing == "never":
        expected = oracle(family, plain, [layer.name for layer in engine.layers], family.batch(*sizes[-1]))
    else:
        owners = dict.fromkeys(name.rpartition(".")[0] for name in found if found[name] in (PRECONDITIONED, WEIGHED))
        # One parameter may have a name in another module that only hands it on.
        modules = [name for name in owners if find_kernel(plain.get_submodule(name))[1] is not None]
        expected = clipping_oracle(family, plain, modules, family.batch(*sizes[-1]))
    return {
        name: judge(name, found.get(name, "in no list of the report"), parameter.grad, *expected)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def judge(name: str, outcome: str, grad: Tensor | None, plain: Gradients, weighted: Gradients) -> Verdict:
    if outcome not in (PRECONDITIONED, WEIGHED):
        return Verdict(outcome, distance(name, grad, plain), PLAIN_TOLERANCE)
    if name not in weighted:
        return Verdict(outcome, math.inf, TOLERANCE)
    shift = distance(name, weighted[name], plain) if plain[name].any() else math.inf  # no gradient has no shift
    return Verdict(outcome, distance(name, grad, weighted), TOLERANCE, shift)


def distance(name: str, found: Tensor | None, expected: Gradients) -> float:
    """Relative to the gradient, or to 1e-4 of its module's where it vanishes, as that of a key's bias does."""
    module = name.rpartition(".")[0]
    whole = [value for key, value in expected.items() if key.rpartition(".")[0] == module]
    scale = max(float(expected[name].norm()), 1e-4 * float(torch.stack([value.norm() for value in whole]).norm()))
    own = expected[name]
    error = float(torch.linalg.vector_norm((torch.zeros_like(own) if found is None else found) - own))
    return error / scale if scale > 0 else error


# The oracle ----------------------------------------------------------------------------------------------


def oracle(family: Family, model: nn.Module, layers: Sequence[str], batch: Batch) -> tuple[Gradients, Gradients]:
    """The plain gradients of all trainable parameters, and the weighted ones of the preconditioned layers.

    Where the samples are captured in a layer whose input does not begin with them, it has no weighted gradients.
    """
    samples = sample_count(batch)
    plain = gradients(model, batch)
    if family.oracle == "alone":
        columns = [gradients(model, sample(batch, n)) for n in range(samples)]
        u = {name: torch.stack([column[name].flatten() for column in columns], dim=1) for name in plain}
    else:
        u = captured(model, batch, layers)
    weighted: Gradients = {}
    for layer in layers:
        names = own_parameters(layer, model.get_submodule(layer))
        if not all(name in u for name in names):
            continue
        check_mean(names, u, plain)
        whole = torch.cat([u[name] for name in names])
        p = Dense(whole, DAMPING).p if whole.any() else torch.zeros(len(whole), dtype=whole.dtype)
        for name, part in zip(names, p.split([len(u[name]) for name in names]), strict=True):
            weighted[name] = part.view_as(plain[name])
    return plain, weighted


def clipping_oracle(
    family: Family, model: nn.Module, modules: Sequence[str], batch: Batch
) -> tuple[Gradients, Gradients]:
    """The plain gradients, and those that ``sharing="clipped"`` has in some modules."""
    plain, samples = gradients(model, batch), sample_count(batch)
    if not modules:
        return plain, {}

    def alone(model: nn.Module, n: int) -> Tensor:
        return model(**sample(batch, n)).loss / samples

    if family.behind is not None:
        own = {name: plain[name] for name in own_parameters(family.behind, model.get_submodule(family.behind))}
        clip_behind(model.get_submodule(family.behind))
        plain = gradients(model, batch) | own
    with float64():
        if family.oracle == "alone":
            uses = [uses_of(model, modules, alone, n, plain) for n in range(samples)]
        else:
            uses = captured_uses(model, batch, modules)
    weighted, _ = Clipping().gradients(uses)
    return plain, {name: g.view_as(plain[name]) for name, g in weighted.items()}


def clip_behind(module: nn.Module) -> None:
    """From now on the samples' gradients at the output of this module are clipped for all modules before it."""

    def hook(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        a = args[0].detach()

        def clipped(g: Tensor) -> Tensor:
            rows = [(a[n : n + 1], g[n : n + 1]) for n in range(len(g))]
            found = [norm_of(module, *row, (), module.bias is not None, tied=False) for row in rows]
            norms = torch.tensor(found, dtype=g.dtype)
            return g * (norms.mean() / norms).clamp(max=1).view(-1, *[1] * (g.dim() - 1))

        y.register_hook(clipped)
        return y.clone()  # what is captured of this module's own output gradient is not clipped yet

    module.register_forward_hook(hook)


def check_mean(names: Sequence[str], u: Gradients, plain: Gradients) -> None:
    for name in names:
        mean = u[name].mean(dim=1).view_as(plain[name])
        assert distance(name, mean, plain) < PLAIN_TOLERANCE, f"the mean of the oracle's U is no gradient: {name}"


def calls_in(model: nn.Module, batch: Batch, modules: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output gradient of the modules that see ``[samples, ...]``, once, in the batch as a whole."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}
    samples = sample_count(batch)

    def hook(name: str) -> Any:
        def catch(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            a, expanded = args[0].detach(), None
            if isinstance(module, nn.Embedding) and len(output) == 1:  # a table of positions
                a, expanded = a.expand(samples, -1), output.expand(samples, -1, -1)
            calls[name].append((a, output if expanded is None else expanded))
            return expanded

        return catch

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in modules]
    with float64():
        loss = model(**batch).loss
    for handle in handles:
        handle.remove()
    seen = {name: call[0] for name, call in calls.items() if len(call) == 1 and len(call[0][0]) == samples}
    grads = torch.autograd.grad(loss, [output for _, output in seen.values()])
    return {name: (a, g) for (name, (a, _)), g in zip(seen.items(), grads, strict=True)}


def captured(model: nn.Module, batch: Batch, layers: Sequence[str]) -> Gradients:
    """U of the layers that see ``[samples, ...]``."""
    u: Gradients = {}
    for name, (a, g) in calls_in(model, batch, layers).items():
        module, names = model.get_submodule(name), own_parameters(name, model.get_submodule(name))
        own = [model.get_parameter(full) for full in names]
        shares = [torch.autograd.grad(module(a[n : n + 1]), own, g[n : n + 1]) for n in range(len(a))]
        for full, of in zip(names, zip(*shares, strict=True), strict=True):
            u[full] = torch.stack([len(a) * h.flatten() for h in of], dim=1)
    return u


def captured_uses(model: nn.Module, batch: Batch, modules: Sequence[str]) -> list[dict[tuple[str, int], Use]]:
    """`tests.reference.uses_of` of every sample, from the batch as a whole."""
    found: list[dict[tuple[str, int], Use]] = [{} for _ in range(sample_count(batch))]
    for name, (a, g) in calls_in(model, batch, modules).items():
        module, names = model.get_submodule(name), own_parameters(name, model.get_submodule(name))
        own = [model.get_parameter(full) for full in names]
        for n, uses in enumerate(found):
            parts = torch.autograd.grad(module(a[n : n + 1]), own, g[n : n + 1])
            norm = norm_of(module, a[n : n + 1], g[n : n + 1], parts, len(own) > 1, tied=False)
            uses[name, 0] = Use(norm, {full: part.flatten() for full, part in zip(names, parts, strict=True)})
    return found


# Pieces --------------------------------------------------------------------------------------------------


def own_parameters(name: str, module: nn.Module) -> list[str]:
    return [f"{name}.{leaf}" for leaf, p in module.named_parameters(recurse=False) if p.requires_grad]


def sample_count(batch: Batch) -> int:
    return len(next(value for value in batch.values() if isinstance(value, Tensor)))


def sample(batch: Batch, n: int) -> Batch:
    return {key: value[n : n + 1] if isinstance(value, Tensor) else value for key, value in batch.items()}


def backward(model: nn.Module, batch: Batch) -> None:
    with float64():
        loss = model(**batch).loss
    loss.backward()


def gradients(model: nn.Module, batch: Batch) -> Gradients:
    """Of all trainable parameters, zero where the loss does not depend on one."""
    with float64():
        loss = model(**batch).loss
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if grad is None else grad
        for (name, p), grad in zip(trained.items(), grads, strict=True)
    }


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keep the coverage report out of the output of a run over all families."""
    logger = logging.getLogger("hf_fngd")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
