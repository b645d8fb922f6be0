"""Matrices that an update rule steps although no layer type can weigh their samples.

These are the experts of a mixture, since only their module knows whose tokens they get; the projections of torch's own
attention, which calls no layer; and subclasses of Linear and convolutions that compute something else.
"""

import torch
from torch import nn

from hf_fngd.layers.base import Matrices
from hf_fngd.layers.convolution import CONVOLUTIONS
from hf_fngd.layers.linear import MATRICES
from hf_fngd.layers.modules import plain_class


def unweighed_matrices(module: nn.Module) -> dict[str, Matrices]:
    """The matrices that a module's own parameters consist of, by the parameter's name.

    A mixture's experts are taken by a rule: the class is called "...Experts", the parameter has three dimensions, and
    the first one counts the experts.
    """
    shapes = {name: p.shape for name, p in module.named_parameters(recurse=False) if p.dim() > 1 and not p.is_complex()}
    counts: dict[str, int] = {}
    if isinstance(module, nn.MultiheadAttention):
        counts = {"in_proj_weight": 3, "q_proj_weight": 1, "k_proj_weight": 1, "v_proj_weight": 1}
    elif isinstance(module, MATRICES):
        counts = {"weight": 1} if len(shapes.get("weight", ())) == 2 else {}
    elif isinstance(module, CONVOLUTIONS):
        shape = shapes.get("weight", torch.Size())
        return {"weight": (module.groups, shape[1:].numel())} if len(shape) > 2 else {}
    elif plain_class(module).__name__.endswith("Experts"):
        counts = {name: shape[0] for name, shape in shapes.items() if len(shape) == 3}
    return {name: (counts[name], shape[-1]) for name, shape in shapes.items() if name in counts}
