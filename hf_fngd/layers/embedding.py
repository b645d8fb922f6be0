"""torch.nn.Embedding and its subclasses: the output's gradient is weighed before the table sums it up.

An embedding is a Linear whose inputs are rows of the identity, so a sample's norm is that of its output gradient.

A table of positions is called with one row of ids for the whole batch, ``[1, T]``. If its output is then added to a
tensor that has the batch, it is expanded to the batch before the sum, so that its gradient keeps the samples apart.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from hf_fngd.layers.base import Call, Forward, LayerKernel, Layout, register_layer_type

A_TABLE = "the whole batch shares its output, as that of a table of positions, and no sum with the batch reads it"


class EmbeddingKernel(LayerKernel):
    """``y = W[x]``."""

    finds_samples = by_rows = of_ids = True

    def __init__(self) -> None:
        # The outputs of a forward pass that the whole batch shares, as nodes of the graph; None where nobody asks.
        self.outputs: list[Any] | None = None

    def folds(self, dim: int) -> bool:
        return True

    def takes(self, x: Any, *others: Any) -> bool:
        return isinstance(x, Tensor) and not others

    def run(self, module: nn.Module, own: Forward, x: Tensor, call: Call) -> Any:
        y = own()
        if not isinstance(y, Tensor):
            return y
        shared = y.dim() == 3 and len(y) == 1 and (call.batch_rows or 0) > 1
        if shared and self.expands:
            return call.weigh(y.expand(call.batch_rows or 0, -1, -1))
        y = call.weigh(y)
        if shared and self.outputs is not None:
            self.outputs.append(y.grad_fn)
        return y

    def inspect(self, consumers: Sequence[Sequence[tuple[str, tuple[int, ...]]]], rows: int) -> None:
        """Decide whether outputs are expanded, from the operations of the first graph that read each of `outputs`.

        They are if only sums with a tensor ``[B, T, d]`` of the batch's rows read them. One with more rows (choices
        folded into the batch), or with more dimensions, does not count.
        """
        self.expands = all(
            bool(of_one) and all((name, shape[0], len(shape)) == ("AddBackward0", rows, 3) for name, shape in of_one)
            for of_one in consumers
        )

    def layout(self, known: bool | None, x: Tensor | None, g: Tensor, samples: int) -> Layout:
        if g.dim() == 2 or (len(g) == 1 and samples > 1):
            return known, None if self.expands else A_TABLE
        return super().layout(known, x, g, samples)


@register_layer_type("embedding")
def embedding_kernel(module: nn.Module) -> EmbeddingKernel | None:
    """Take an embedding, a model's own subclass included."""
    return EmbeddingKernel() if isinstance(module, nn.Embedding) else None
