"""Random numbers in the probe: the same ones for every sample, and in every pass."""

import contextlib
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_SEED = 0


@contextlib.contextmanager
def same_draws(samples: int, dim: int) -> Iterator[None]:
    """Let a forward pass on so many samples draw the same random numbers for each of them, and in every such pass.

    A tensor holds the samples if dimension ``dim`` has ``samples`` entries, or else if dimension 0 has. Two passes on
    different batches agree if they call random operators in the same order. Numbers of Python's and numpy's generators
    are drawn in the same order, whatever they are for. The default generators are not put back.
    """
    random.seed(_SEED)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(_SEED)
    with _SameDraws(samples, dim):
        yield


class _SameDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls each random operator for each sample by itself, with the seed that the operator's place in the pass has."""

    def __init__(self, samples: int, dim: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._samples, self._dims, self._seed = samples, dict.fromkeys((dim, 0)), _SEED

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator. A generator among its arguments keeps its state."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        self._seed += 1
        values = [*args, *kwargs.values()]
        dim = next((dim for dim in self._dims if any(self._holds(value, dim) for value in values)), None)
        out = kwargs.get("out")
        if dim is not None and isinstance(out, Tensor) and not self._holds(out, dim):
            dim = None  # it is yet to be resized, and drawn as a whole
        own = next((value for value in values if isinstance(value, Generator)), None)
        kept = None if own is None else own.get_state()
        generator = _default_generator(values) if own is None else own
        results = []
        for n in range(1 if dim is None else self._samples):
            generator.manual_seed(self._seed)
            of_one = [self._part(value, dim, n) for value in args]
            results.append(func(*of_one, **{key: self._part(value, dim, n) for key, value in kwargs.items()}))
        if own is not None and kept is not None:
            own.set_state(kept)
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        if func._schema.returns and (alias := func._schema.returns[0].alias_info) is not None:
            for argument in func._schema.arguments:
                if argument.alias_info is not None and argument.alias_info.before_set & alias.before_set:
                    return given[argument.name]
        if dim is None:
            return results[0]
        if isinstance(results[0], tuple):
            return tuple(_joined(some, dim) for some in zip(*results, strict=True))
        return _joined(results, dim)

    def _holds(self, value: Any, dim: int) -> bool:
        size = isinstance(value, list) and all(isinstance(one, int) for one in value)
        shape = value.shape if isinstance(value, Tensor) else value if size else ()
        return len(shape) > dim and shape[dim] == self._samples

    def _part(self, value: Any, dim: int | None, n: int) -> Any:
        """An argument for one sample: a tensor is a view, a size has 1 in its place."""
        if dim is None or not self._holds(value, dim):
            return value
        return value.narrow(dim, n, 1) if isinstance(value, Tensor) else [*value[:dim], 1, *value[dim + 1 :]]


def _joined(results: Sequence[Any], dim: int) -> Any:
    """What an operator returned for each sample, in one; what is no tensor with this dimension is the first one's."""
    if all(isinstance(one, Tensor) and one.dim() > dim for one in results):
        return torch.cat(list(results), dim)
    return results[0]


def _default_generator(values: list[Any]) -> Any:
    """What draws where these arguments name no generator. Not all of them: those of devices that are not used stay."""
    devices = [value.device if isinstance(value, Tensor) else value for value in values]
    device = next((one for one in devices if isinstance(one, torch.device)), torch.device("cpu"))
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.get_device_module(device)
