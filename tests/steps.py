"""Steps of the small networks, their oracle, and how what came of them is compared."""

import hashlib
import io
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_fngd import FNGD, FNGDPreconditioner
from hf_fngd.weights.base import MicroBatchWeights
from hf_fngd.weights.solved import NeverSharing
from tests.nets import LAYER_NAMES, data, loss, net, trained
from tests.reference import Dense, per_sample_gradients


def with_fngd(model: nn.Module | None = None, **settings: Any) -> tuple[Any, FNGD]:
    """A model, `net()` where none is given, and FNGD on it."""
    model = net() if model is None else model
    return model, FNGD(model, **settings)


def with_engine(model: nn.Module | None = None, **settings: Any) -> tuple[Any, FNGDPreconditioner]:
    """The same with FNGD's preconditioner alone."""
    model = net() if model is None else model
    return model, FNGDPreconditioner(model, **settings)


def one_step(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    """Of an optimizer, or of a preconditioner alone."""
    model.zero_grad()
    loss(model, x, y).backward()
    optimizer.step()


def train(model: nn.Module, optimizer: FNGD, steps: int, first: int = 0, scale: float = 1.0) -> None:
    """Steps that depend on their number alone; ``scale`` is that of the loss."""
    for step in range(first, first + steps):
        x, y = data(6, 3, seed=step, dtype=trained(model)[0].dtype)
        optimizer.zero_grad()
        (scale * loss(model, x, y)).backward()
        optimizer.step()


def parameters(module: nn.Module) -> list[Tensor]:
    """Copies of their values."""
    return [p.detach().clone() for p in module.parameters()]


def gradient(module: nn.Module) -> Tensor:
    """That of all trained parameters, flat and in float64."""
    return torch.cat([p.grad.flatten() for p in trained(module)]).double()


def assert_equal(model: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def dense(
    model: nn.Module, x: Tensor, y: Tensor, damping: float, names: Iterable[str] = LAYER_NAMES
) -> dict[str, Dense]:
    """The oracle for layers of a plain model, those of a `Net` where no names are given."""

    def alone(model: nn.Module, n: int) -> Tensor:
        return loss(model, x[n : n + 1], y[n : n + 1])

    layers = {name: trained(model.get_submodule(name)) for name in names}
    return {name: Dense(per_sample_gradients(model, of, alone, len(x)), damping) for name, of in layers.items()}


class Watched(NeverSharing):
    """``never``, for a test that looks at a micro-batch's sample weights ``[L, N]`` before the step."""

    batch: Any = None

    def begin(self, size: int, offset: int) -> MicroBatchWeights:
        self.batch = super().begin(size, offset)
        return self.batch

    @property
    def w(self) -> Tensor:
        return self.batch.w


def through_file(value: Any, weights_only: bool = True) -> Any:
    """As a file gives it back."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


class Allocations(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation makes, apart from the given ones."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.inputs = {x.untyped_storage().data_ptr() for x in inputs}
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        storages = [x.untyped_storage() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.largest = max(self.largest, *(x.nbytes() for x in storages if x.data_ptr() not in self.inputs), 0)
        return result


def graph_nodes(output: Tensor) -> Iterator[str]:
    """The names of the autograd nodes behind a tensor."""
    seen, stack = set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield type(node).__name__
            stack += [following for following, _ in node.next_functions]


def digest(value: Any) -> str:
    """Of tensors, numbers, lists and dictionaries, bit for bit."""
    if isinstance(value, dict):
        return hashlib.sha256(
            "".join(f"{k}:{digest(v)}" for k, v in sorted(value.items(), key=str)).encode()
        ).hexdigest()
    if isinstance(value, list | tuple):
        return digest(dict(enumerate(value)) | {"type": "list"}) if value else "[]"
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if isinstance(value, Tensor):
        return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest() + str(value.dtype)
    return repr(value)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))
