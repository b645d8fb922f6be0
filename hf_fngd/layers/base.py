"""What the engine has to know of a layer type, and the registry of the types that it knows."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


class LayerKernel(ABC):
    """The conversions between one layer type and the canonical layout of `hf_fngd.persample`.

    A kernel is stateless. A new layer type is one file with one subclass and one `register_kernel` call.
    """

    @abstractmethod
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's own forward, bit for bit."""

    @abstractmethod
    def input_gradient(self, g: Tensor, weight: Tensor) -> Tensor:
        """dL/dx from ``g = dL/dy``."""

    @abstractmethod
    def canonical(self, x: Tensor, samples: int) -> Tensor:
        """Reshape the layer's input, or its output gradient, to ``[N, T, features]``."""

    @abstractmethod
    def weighted_gradient(self, a: Tensor, g: Tensor, w: Tensor | None) -> Tensor:
        """``sum_n w_n h_n`` in the layout of the layer's weight; w = None means ones."""


_KERNELS: dict[type[nn.Module], LayerKernel] = {}


def register_kernel(layer_type: type[nn.Module], kernel: LayerKernel) -> None:
    """Make the engine precondition modules whose type is exactly ``layer_type``.

    Raises:
        ValueError: the type has a kernel already.
    """
    if layer_type in _KERNELS:
        raise ValueError(f"{layer_type.__name__} already has the kernel {type(_KERNELS[layer_type]).__name__}")
    _KERNELS[layer_type] = kernel


def kernel_for(module: nn.Module) -> LayerKernel | None:
    """The kernel of a module's exact type, or None.

    Subclasses do not count: quantized, LoRA and attention-internal subclasses of Linear compute other things.
    """
    layer_type = type(module)
    if issubclass(layer_type, FSDPModule):  # a class that FSDP2 generated for a module that it sharded
        layer_type = layer_type.__mro__[layer_type.__mro__.index(FSDPModule) + 1]
    # FSDP2's class may have been made of the subclass of a preconditioner that is gone.
    return _KERNELS.get(getattr(layer_type, "_fngd_plain_class", layer_type))


def known_layers() -> tuple[str, ...]:
    """The names of the registered layer types."""
    return tuple(sorted(layer_type.__name__ for layer_type in _KERNELS))
