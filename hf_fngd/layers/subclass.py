"""Which subclasses of a layer compute what their base computes.

A subclass that inherits the forward does, unless something took its weight's place. If a subclass of Linear has a
forward of its own, that is tried on numbers: in several dtypes, sizes and shapes, with and without a bias, under
autocast, and with the gradients. The trial uses a stand-in that has a weight, a bias and nothing else. A forward that
reads anything else of its layer is not trusted, whatever it computes now: a scale may change, an adapter may come.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from hf_fngd.layers.modules import plain_class

_METHODS = ("forward", "_conv_forward", "_output_padding")  # the forwards of all layers, and what they call


def base_of(module: nn.Module, *bases: type[nn.Module]) -> type[nn.Module] | None:
    """Which of these base classes a module belongs to, if it computes the same as that class; else None."""
    base = _base(plain_class(module), bases)
    return base if base is not None and refusal(module, *bases) is None else None


def inherits(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a module's own forward is that of its base."""
    cls = plain_class(module)
    return all(getattr(cls, name, None) is getattr(base, name, None) for name in _METHODS)


def refusal(module: nn.Module, *bases: type[nn.Module]) -> str | None:
    """Why a subclass of one of the ``bases`` is not taken for its base.

    None if it is taken, or is no subclass; empty if its name alone says why. A subclass's own forward is tried for
    `torch.nn.Linear` only.
    """
    cls: Any = plain_class(module)
    base = _base(cls, bases)
    if base is None or cls is base:
        return None
    if issubclass(cls, NonDynamicallyQuantizableLinear) or is_parametrized(module):
        return ""  # the former is never called: nn.MultiheadAttention uses its weight without it
    weight = module._parameters.get("weight")
    if weight is None or module.weight is not weight or not weight.is_floating_point():
        return f"its weight is no parameter as {base.__name__}'s is"
    if not set(module._parameters) <= {"weight", "bias"} or module._modules:
        return "it has more than a weight and a bias"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if inherits(module, base):
        return None
    return _tried(cls, cls.forward) if base is nn.Linear else "it has a forward of its own"


def _base(cls: type[nn.Module], bases: tuple[type[nn.Module], ...]) -> type[nn.Module] | None:
    return next((base for base in bases if issubclass(cls, base)), None)


# A forward of its own ----------------------------------------------------------------------------------------


class _OtherAttributeError(Exception):
    """A forward asks for an attribute that a Linear does not have, or sets one."""


class _Trial(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]  # of the input
    features: int  # of the output
    bias: bool
    scale: float = 1.0
    training: bool = True
    autocast: bool = False


@functools.cache
def _tried(cls: Any, forward: Callable[..., Any]) -> str | None:
    """Why the forward of a Linear's subclass is not trusted; None if it computes what Linear does, with gradients."""
    if not isinstance(forward, FunctionType) or len(inspect.signature(forward).parameters) != 2:
        return "its forward takes other arguments"
    asked: list[str] = []
    try:
        with torch.random.fork_rng([]), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            same = all(_same(cls, asked, trial) for trial in _trials())
    except Exception as error:  # whatever a class raises that misses its attributes
        return f"its forward depends on its {asked[0]}" if asked else f"its forward failed when tried ({error})"
    if asked:
        return f"its forward depends on its {asked[0]}"
    return None if same else "its forward computes something else than Linear's"


def _trials() -> Iterator[_Trial]:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for shape, features in [((4, 5), 3), ((2, 3, 16), 8), ((2, 1, 2, 6), 6), ((3, 1), 1)]:
            for bias in (True, False):
                yield _Trial(dtype, shape, features, bias)
        yield _Trial(dtype, (4, 5), 3, bias=True, training=False)
    for bias in (True, False):
        yield _Trial(torch.float64, (4, 5), 3, bias, scale=1e5)
        yield _Trial(torch.float32, (2, 3, 16), 8, bias, autocast=True)


def _same(cls: type[nn.Module], asked: list[str], trial: _Trial) -> bool:
    """Whether output and gradients are those of a Linear, up to the rounding of their sums of products."""
    i, o = trial.shape[-1], trial.features
    x = _values(trial.shape, 1.0, trial).requires_grad_()
    weight, bias = (nn.Parameter(_values(shape, 2.0, trial)) for shape in ((o, i), (o,)))
    own = {"weight": weight, "bias": bias if trial.bias else None, "in_features": i, "out_features": o}
    layer = _stand_in(cls, own | {"training": trial.training}, asked)
    versions = [values._version for values in (x, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16, enabled=trial.autocast):
        y = layer.forward(x)
        if not isinstance(y, Tensor) or y.shape != (*trial.shape[:-1], o) or asked:
            return False
        if trial.autocast:  # the kernel casts the input as autocast would
            cast = layer.forward(x.to(torch.bfloat16))
            if cast.dtype != y.dtype or not torch.equal(cast, y):
                return False
    if versions != [values._version for values in (x, weight, bias)] or (x.dim() == 2 and y._is_view()):
        return False
    dtype = torch.bfloat16 if trial.autocast else trial.dtype
    g = _values(y.shape, 3.0, trial).to(dtype)
    leaves = [x, weight, *([bias] if trial.bias else [])]
    found = [y.detach(), *torch.autograd.grad(y, leaves, g.to(y.dtype))]
    if y.dtype != dtype and not trial.autocast:
        return False
    # In float64 from the same operands, and the sums of the absolute values beside it.
    operands = [values.detach().to(dtype).double() for values in (x, weight, bias if trial.bias else bias * 0, g)]
    exact, bounds = _linear(*operands), _linear(*(values.abs() for values in operands))
    for one, value, bound, terms in zip(found, exact, bounds, (i, o, x.numel() // i, x.numel() // i), strict=False):
        error = (one.double().view_as(value) - value).abs()
        # A sum of n products, and one more term, in any order: each of n + 2 operations rounds once.
        if not bool((error <= (terms + 2) * torch.finfo(dtype).eps / 2 * bound).all()):
            return False
    return True


def _linear(x: Tensor, w: Tensor, b: Tensor, g: Tensor) -> list[Tensor]:
    """Output and gradients of x, weight and bias, from the output's gradient."""
    x, g = x.flatten(0, -2), g.flatten(0, -2)
    return [F.linear(x, w, b), g @ w, g.t() @ x, g.sum(0)]


def _values(shape: Sequence[int], seed: float, trial: _Trial) -> Tensor:
    """Numbers of both signs and of several sizes, and some zeros."""
    count = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64, device="cpu")
    values = torch.sin(seed * count + count.square()) * 10 ** torch.cos(1.3 * count + seed)
    return (torch.where(count % 7 == 3, 0, values) * trial.scale).view(*shape).to(trial.dtype)


def _stand_in(cls: type[nn.Module], own: dict[str, Any], asked: list[str]) -> Any:
    """An instance with these attributes and its class's methods; ``asked`` collects any other that is used."""

    def read(one: Any, name: str) -> Any:
        if name in own:
            return own[name]
        if isinstance(inspect.getattr_static(cls, name, None), FunctionType | staticmethod):
            return object.__getattribute__(one, name)
        asked.append(name)
        raise _OtherAttributeError

    def write(one: Any, name: str, value: Any) -> None:
        asked.append(name)
        raise _OtherAttributeError

    watched: Any = type(cls.__name__, (cls,), {"__getattribute__": read, "__setattr__": write})
    return watched.__new__(watched)
