"""Tables that are parameters ``[1, T, d]``, as a Vision Transformer's positions and class token.

The module's own forward runs on each of them expanded to one row a sample. The gradient of the expanded table has the
samples apart, so its norms are exact.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from hf_fngd.layers.base import (
    Call,
    Forward,
    LayerKernel,
    Layout,
    With,
    find_kernel,
    plain_class,
    register_layer_type,
    to_train,
    trained,
)
from hf_fngd.layers.linear import LinearKernel
from hf_fngd.samples.rows import NOT_THE_BATCH

NOT_ON_ROWS = "its forward does not compute the same on one row a sample of its parameters"


class TableKernel(LayerKernel):
    """A module that adds or prepends its own parameters to a batch. The first call tries whether expanded ones do."""

    def __init__(self) -> None:
        self._tried = False

    def takes(self, x: Any, *others: Any) -> bool:
        return self.fault is None and isinstance(x, Tensor) and x.dim() > 1

    def run(self, module: nn.Module, own: Forward, x: Tensor, call: Call) -> Any:
        if (call.batch_rows or 1) > 1 and not self._tried:  # on one row anything computes the same
            self._tried, self.fault = True, None if _same(module, own, x) else NOT_ON_ROWS
            if self.fault is not None:
                return own()
        return _on_rows(module, own, {name: call.weigh(p) for name, p in _expanded(module, len(x)).items()})

    def layout(self, known: bool | None, x: Tensor | None, g: Tensor, samples: int) -> Layout:
        return (True, None) if len(g) == samples else (known, NOT_THE_BATCH)


def _expanded(module: nn.Module, samples: int) -> dict[str, Tensor]:
    return {name: p.expand(samples, -1, -1) for name, p in trained(module).items()}


def _on_rows(module: nn.Module, own: Forward, rows: dict[str, Tensor]) -> Any:
    args = own.args[1:] if own.args and own.args[0] is module else own.args  # the compiler's has no module in it
    return plain_class(module).forward(With(module, **rows), *args, **own.keywords)


def _same(module: nn.Module, own: Forward, x: Tensor) -> bool:
    """Whether the module's forward computes the same with its parameters expanded to one row a sample."""
    alike = functools.partial(torch.random.fork_rng, [x.device] if x.is_cuda else [])  # both have the same dropout
    with torch.no_grad():
        with alike():
            expected = own()
        try:
            with alike():
                found = _on_rows(module, own, _expanded(module, len(x)))
        except Exception:  # whatever a model's own class does with parameters of another shape
            return False
    return isinstance(expected, Tensor) and isinstance(found, Tensor) and torch.equal(expected, found)


@register_layer_type("table")
def table_kernel(module: nn.Module) -> TableKernel | None:
    """Of a module with parameters ``[1, T, d]`` of its own and no others to train, and no Linear or Conv1D below it."""
    own = (trained(module) or to_train(module)).values()
    if not own or any(p.dim() != 3 or len(p) != 1 for p in own):
        return None
    below = (find_kernel(child)[1] for child in module.modules() if child is not module)
    return None if any(isinstance(kernel, LinearKernel) for kernel in below) else TableKernel()
