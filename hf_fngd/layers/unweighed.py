"""Matrices in modules whose samples no layer type can weigh, and which an update rule for matrices steps all the same.

These are the experts of a mixture, whose tokens are known to their module alone, the projections of torch's own
attention, which calls no layer, and subclasses of Linear that do not compute what it does.
"""

from torch import nn

from hf_fngd.layers.base import plain_class
from hf_fngd.layers.linear import MATRICES


def unweighed_matrices(module: nn.Module) -> dict[str, int]:
    """By the name of a module's own parameter: of how many matrices, stacked in its first dimensions, it consists.

    A mixture's experts are taken by a rule: the class is called "...Experts", the parameter has three dimensions, and
    the first one counts the experts.
    """
    shapes = {name: p.shape for name, p in module.named_parameters(recurse=False) if p.dim() > 1 and not p.is_complex()}
    if isinstance(module, nn.MultiheadAttention):
        counts = {"in_proj_weight": 3, "q_proj_weight": 1, "k_proj_weight": 1, "v_proj_weight": 1}
        return {name: counts[name] for name in shapes if name in counts}
    if isinstance(module, MATRICES):
        return dict.fromkeys([name for name, shape in shapes.items() if name == "weight" and len(shape) == 2], 1)
    if plain_class(module).__name__.endswith("Experts"):
        return {name: shape[0] for name, shape in shapes.items() if len(shape) == 3}
    return {}
