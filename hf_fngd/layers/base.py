"""The interface of a layer type, and the registry of layer types.

A layer type is one file with one function and one `register_layer_type`. The function returns a `LayerKernel` for each
module that it takes. A kernel forms the weighted gradient in one of two ways:

* the kernel owns forward and backward (`ExplicitKernel`), and its backward returns ``sum_n w_n h_n`` in place of the
  gradient of the layer's weight, while the input's gradient stays plain (behind a BatchNorm the engine may weigh it);
* the module's own forward runs, and the gradient of one tensor in it, whose first dimension is the sample, is
  multiplied by the sample weights on its way back (`Call.weigh`).
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from hf_fngd.samples.rows import NOT_THE_BATCH, Rows
from hf_fngd.weights.algebra import tensor_norms

AMBIGUOUS = (
    "two dimensions of its input have the size of the batch, and no batch so far told which of them holds the samples "
    "(another batch size or sequence length does)"
)


Forward = functools.partial[Any]
Layout = tuple[bool | None, str | None]
Matrices = tuple[int, int]  # how many matrices a parameter stacks in its first dimensions, and their columns


class Call(Protocol):
    """What the engine offers a kernel for one call of a layer in a training forward pass. It is a dataclass.

    Attributes:
        samples: the number of samples N.
        batch_rows: the number of rows in the batch B. It differs from N where ids say which sample each row belongs to.
            In a compiled graph both are None: it does not know them before it runs.
        rows: where the samples are in the input; None where that is not known.
        rehearsed: in a compiled graph, whether a batch of the model runs eagerly as well.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    rows: Rows | None
    rehearsed: bool

    @property
    def samples(self) -> int | None:
        """N."""

    @property
    def batch_rows(self) -> int | None:
        """B."""

    def take(self, kernel: "LayerKernel") -> None:
        """Let another kernel handle this call and later ones; the graphs of earlier calls keep theirs."""

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`ExplicitKernel.forward`, with the kernel's own backward behind it."""

    def weigh(self, y: Tensor, like: Tensor | None = None) -> Tensor:
        """A copy of the tensor y ``[N, ...]``, whose gradient is multiplied by the sample weights on its way back.

        If y's shape does not show which dimension is the batch, pass a tensor ``like`` whose shape does. The kernel's
        methods then get ``like`` as ``x``.
        """


class LayerKernel(ABC):
    """The arithmetic of one layer. ``x`` is its input ``[N, ..., i]``, ``g`` its output gradient ``[N, ..., o]``.

    In an `ExplicitKernel` g has the shape of what its `forward` returned. With `Call.weigh` g is the gradient of the
    weighed tensor, and x what was given as ``like``, or None.

    Attributes:
        fault: why no call's samples can be weighed, once a call has shown that; else None.
        finds_samples: whether it finds the samples itself, where the probe does not tell.
        by_rows: whether it can weigh the rows of a folded input one by one; else it sees a gradient that is summed up.
        of_ids: whether x holds ids, without a dimension of features.
        expands: whether it expands an output that the whole batch shares, ``[1, T, d]``, to the batch.
        adds: whether a sample's norm is the sum of its rows' norms; else it is the root of the sum of their squares.
    """

    fault: str | None = None
    finds_samples: bool = False
    by_rows: bool = False
    of_ids: bool = False
    expands: bool = False

    @property
    def adds(self) -> bool:
        """See above."""
        return False

    def folds(self, dim: int) -> bool:
        """Whether the arithmetic holds where dimension ``dim`` of x has several rows a sample (default: it does not).

        The dimensions before it are then flattened with it.
        """
        return False

    def takes(self, x: Any, *others: Any) -> bool:
        """Whether a call with these arguments can be weighed at all; otherwise the module's own forward runs."""
        return isinstance(x, Tensor) and not x.is_nested and x.dim() > 1 and not others

    @abstractmethod
    def run(self, module: nn.Module, own: Forward, x: Tensor, call: Call) -> Any:
        """Run a module in a training forward pass. ``own()`` runs its own forward with all arguments of the call."""

    def layout(self, known: bool | None, x: Tensor | None, g: Tensor, samples: int) -> Layout:
        """Whether the first dimension is the batch, and why the samples cannot be weighed (None: they can).

        ``known`` is what earlier calls of the layer showed, None for nothing; ``samples`` is N.
        """
        shape = g.shape if x is None else x.shape
        if len(shape) < 2 or shape[0] != samples or samples == 0:
            known = False
        elif known is None:
            if samples == 1:
                return None, None  # everything belongs to that sample
            if samples in shape[1:-1]:
                return None, AMBIGUOUS
            known = True
        return known, None if known else NOT_THE_BATCH

    def norms(self, x: Tensor | None, g: Tensor, has_bias: bool) -> Tensor:
        """A cheap measure ``[N]`` of the norms of the rows' gradients, with or without a bias (default: those of g).

        It need not bound them, and may have any factor that is the same for all samples.
        """
        return tensor_norms(g)


class Saved(NamedTuple):
    """What an `ExplicitKernel` has in backward: input, the layer's weight, and what its forward saved."""

    x: Tensor
    weight: Tensor
    others: tuple[Tensor, ...]


class ExplicitKernel(LayerKernel):
    """A kernel with a forward and a backward of its own."""

    by_rows = True

    @abstractmethod
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute what the layer's own forward does, bit for bit.

        Returns the output, which must be no view, and the tensors that backward needs beside x and weight.
        """

    @abstractmethod
    def input_gradient(self, saved: Saved, g: Tensor) -> Tensor:
        """dL/dx, in x's shape, from ``g = dL/dy``, in the shape of `forward`'s output."""

    @abstractmethod
    def weighted_gradient(
        self, saved: Saved, g: Tensor, w: Tensor | None, has_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """``sum_n w_n h_n`` in the layout of the layer's weight, and its bias column. ``w = None`` means ones."""


class MatrixKernel(ExplicitKernel):
    """A kernel that can also form the Gram matrix of its per-sample gradients."""

    @abstractmethod
    def gram(self, x: Tensor, g: Tensor, has_bias: bool, memory_budget: int) -> Tensor:
        """K ``[N, N]`` up to one factor, from input and output gradient, within a temporary memory in bytes."""

    def matrices(self, weight: Tensor) -> Matrices:
        """The matrices that the layer's weight consists of, for update rules (default: it is one matrix)."""
        return 1, weight.shape[-1]

    def multiplications(self, x: Tensor, g: Tensor, weight: Tensor) -> int:
        """How many multiplications one call's forward takes: one for each position and entry of the weight.

        By default those of ``x W^T``.
        """
        return g.numel() * weight.shape[-1]


MakeKernel = Callable[[nn.Module], LayerKernel | None]
_LAYER_TYPES: dict[str, MakeKernel] = {}
_DEFAULT: set[str] = set()


def register_layer_type(name: str, *, default: bool = True) -> Callable[[MakeKernel], MakeKernel]:
    """Function decorator: make the engine weigh the samples of a family of modules.

    The argument ``layer_types`` calls it by this name; where that is None, ``default`` decides. Raises ValueError where
    the name is taken.
    """

    def register(make: MakeKernel) -> MakeKernel:
        if name in _LAYER_TYPES:
            raise ValueError(f"there is already a layer type named {name!r}")
        _LAYER_TYPES[name] = make
        _DEFAULT.update([name] if default else [])
        return make

    return register


def layer_type_names(default: bool = False) -> tuple[str, ...]:
    """The registered names in their order, all of them or those that are weighed by default."""
    return tuple(name for name in _LAYER_TYPES if name in _DEFAULT or not default)


def find_kernel(module: nn.Module) -> tuple[str | None, LayerKernel | None]:
    """The name of a module's layer type and its kernel; None and None where no layer type takes it."""
    for name, make in _LAYER_TYPES.items():
        if (kernel := make(module)) is not None:
            return name, kernel
    return None, None
