"""Layer types, one file each behind one registry, and which layers of a model are taken."""

from hf_fngd.layers import conv1d, convolution, embedding, linear, norm
from hf_fngd.layers.base import (
    AMBIGUOUS,
    Call,
    ExplicitKernel,
    GramKernel,
    LayerKernel,
    LayerType,
    find_kernel,
    layer_type_names,
    register_layer_type,
)
from hf_fngd.layers.select import ALL_LINEAR, Modules, Selected, Selection, select_layers

__all__ = [
    "ALL_LINEAR",
    "AMBIGUOUS",
    "Call",
    "ExplicitKernel",
    "GramKernel",
    "LayerKernel",
    "LayerType",
    "Modules",
    "Selected",
    "Selection",
    "conv1d",
    "convolution",
    "embedding",
    "find_kernel",
    "layer_type_names",
    "linear",
    "norm",
    "register_layer_type",
    "select_layers",
]
