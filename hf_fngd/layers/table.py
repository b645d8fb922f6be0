"""Tables that are parameters ``[1, T, d]``, such as a Vision Transformer's positions and class token.

The module's own forward runs on the parameters, each expanded to one row a sample. The gradient of the expanded table
keeps the samples apart, so its norms are exact.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from hf_fngd.layers.base import Call, Forward, LayerKernel, Layout, find_kernel, register_layer_type
from hf_fngd.layers.linear import LinearKernel
from hf_fngd.layers.modules import plain_class, to_train, trained, with_methods
from hf_fngd.samples.inputs import copied
from hf_fngd.samples.rows import NOT_THE_BATCH
from hf_fngd.samples.snapshot import untouched

NOT_ON_ROWS = "its forward does not compute the same on one row a sample of its parameters"


class TableKernel(LayerKernel):
    """A module that adds or prepends its own parameters to a batch.

    The first call on each shape of a sample tests whether expanded parameters work: positions may be interpolated.
    """

    finds_samples = True

    def __init__(self, module: nn.Module) -> None:
        self._tried: set[tuple[int, ...]] = set()  # shapes
        self._with = with_methods(module)

    def takes(self, x: Any, *others: Any) -> bool:
        return self.fault is None and isinstance(x, Tensor) and x.dim() > 1

    def run(self, module: nn.Module, own: Forward, x: Tensor, call: Call) -> Any:
        if call.batch_rows is None:  # in a compiled graph
            if not (self._tried or call.rehearsed):
                return own()
        elif call.batch_rows > 1 and (shape := tuple(x.shape[1:])) not in self._tried:  # one row shows nothing
            self._tried.add(shape)
            if not (self._same(module, own, x) and self._apart(module, own, x)):
                self.fault = NOT_ON_ROWS
                return own()
        return self._on_rows(module, own, {name: call.weigh(p) for name, p in _expanded(module, len(x)).items()})

    def layout(self, known: bool | None, x: Tensor | None, g: Tensor, samples: int) -> Layout:
        return (True, None) if len(g) == samples else (known, NOT_THE_BATCH)

    def _on_rows(self, module: nn.Module, own: Forward, rows: dict[str, Tensor]) -> Any:
        args = own.args[1:] if own.args and own.args[0] is module else own.args  # under the compiler it is unbound
        return plain_class(module).forward(self._with(module, **rows), *args, **own.keywords)

    def _trial(self, module: nn.Module, own: Forward, rows: dict[str, Tensor], training: bool) -> Tensor | None:
        """What the forward returns with these parameters; None if it fails or returns no tensor. Leaves no trace."""
        try:
            with untouched(module, training):
                found = self._on_rows(module, _again(own), rows)
        except Exception:  # whatever a model's own class does with parameters of another shape
            return None
        return found if isinstance(found, Tensor) else None

    def _same(self, module: nn.Module, own: Forward, x: Tensor) -> bool:
        """Whether the module's forward computes the same with its parameters expanded to one row a sample."""
        with untouched(module, training=module.training):  # both have the same dropout
            expected = _again(own)()
        found = self._trial(module, own, _expanded(module, len(x)), module.training)
        return isinstance(expected, Tensor) and found is not None and torch.equal(expected, found)

    def _apart(self, module: nn.Module, own: Forward, x: Tensor) -> bool:
        """Whether the parameter rows of one half of the samples leave the other half's outputs alone."""
        half, outputs = len(x) // 2, []
        for factors in ((1.0, 1.0), (2.0, 1.0), (1.0, 2.0)):
            rows = _expanded(module, len(x))
            for name, p in rows.items():
                rows[name] = torch.cat([p[:half] * factors[0], p[half:] * factors[1]]).detach()
            y = self._trial(module, own, rows, training=False)  # in training mode batch norms couple the samples
            if y is None or y.dim() == 0 or len(y) % len(x):
                return False
            outputs.append(y.reshape(len(x), -1))
        plain, first, last = outputs
        return torch.equal(plain[half:], first[half:]) and torch.equal(plain[:half], last[:half])


def _expanded(module: nn.Module, samples: int) -> dict[str, Tensor]:
    return {name: p.expand(samples, -1, -1) for name, p in trained(module).items()}


def _again(own: Forward) -> Forward:
    """The same call on copies of its arguments, since it may change them in place."""
    return functools.partial(own.func, *copied(own.args), **copied(own.keywords))


@register_layer_type("table")
def table_kernel(module: nn.Module) -> TableKernel | None:
    """Take a module all of whose own parameters are ``[1, T, d]``, if no Linear or Conv1D is below it."""
    own = (trained(module) or to_train(module)).values()
    if not own or any(p.dim() != 3 or len(p) != 1 for p in own):
        return None
    below = (find_kernel(child)[1] for child in module.modules() if child is not module)
    return None if any(isinstance(kernel, LinearKernel) for kernel in below) else TableKernel(module)
