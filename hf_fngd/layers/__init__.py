"""The layer types that FNGD preconditions, one file each, behind one registry."""

from hf_fngd.layers import conv1d, linear
from hf_fngd.layers.base import LayerKernel, kernel_for, known_layers, register_kernel

__all__ = ["LayerKernel", "conv1d", "kernel_for", "known_layers", "linear", "register_kernel"]
