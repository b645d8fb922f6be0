"""Which layers of a model are preconditioned, and why the others are not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from hf_fngd.arguments import ALL_LINEAR
from hf_fngd.layers import LayerKernel, kernel_for, known_layers

Modules = str | Sequence[str] | None
TIED = "the weight is tied to another module"


@dataclass(frozen=True)
class Selected:
    """A layer to precondition."""

    name: str
    module: nn.Module
    kernel: LayerKernel


@dataclass(frozen=True)
class SelectedRest:
    """An embedding or a convolution, whose kernel is None, or a layer whose weight is tied to another module's."""

    name: str
    module: nn.Module
    kernel: LayerKernel | None


@dataclass(frozen=True)
class Selection:
    """The outcome for a whole model.

    Attributes:
        layers: the layers to precondition, in the model's order.
        rest: of the other modules those whose samples can be weighed, in the model's order.
        plain: for every other trainable parameter, by name, the reason why its gradient stays plain.
    """

    layers: list[Selected]
    rest: list[SelectedRest]
    plain: dict[str, str]


def select_layers(model: nn.Module, target_modules: Modules, exclude_modules: Modules) -> Selection:
    """Choose the layers to precondition.

    A layer is taken if its type is exactly a registered one, its weight is trained and belongs to it alone
    (a tied output head shares its weight with an embedding), and the two arguments name it, or do not.

    Args:
        model: any module.
        target_modules: ``"all-linear"``, a regular expression that has to match the whole module name, or
            a list of names or dotted suffixes of names, as in PEFT.
        exclude_modules: the same (a regular expression or a list), or None.

    Raises:
        ValueError: a listed target matches no module, or nothing is left to precondition.
    """
    uses = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if parameter.requires_grad
    )
    layers: list[Selected] = []
    rest: list[SelectedRest] = []
    plain: dict[str, str] = {}
    names = [name for name, _ in model.named_modules()]
    _check_targets(names, "target_modules", target_modules)
    _check_targets(names, "exclude_modules", exclude_modules)
    for name, module in model.named_modules():
        reason, kernel = _reason(name, module, uses, target_modules, exclude_modules)
        if reason is None and kernel is not None:
            layers.append(Selected(name, module, kernel))
            continue
        if (_is_table(module) or is_convolution(module) or reason == TIED) and not _matches(name, exclude_modules):
            rest.append(SelectedRest(name, module, kernel))
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                plain.setdefault(f"{name}.{leaf}" if name else leaf, reason or "")
    if not layers:
        raise ValueError(
            "nothing to precondition: the model has no trainable layer of exactly the types "
            f"{', '.join(known_layers())} that target_modules={target_modules!r} and "
            f"exclude_modules={exclude_modules!r} select"
        )
    # A weight is among the rest with all the modules that have it, or with none.
    among = Counter(id(one.module.weight) for one in rest)
    rest = [one for one in rest if among[id(one.module.weight)] == uses[id(one.module.weight)]]
    return Selection(layers, rest, plain)


def _is_table(module: nn.Module) -> bool:
    """Whether a module is an embedding with a trained weight, and nothing else that is trained."""
    return isinstance(module, nn.Embedding) and "forward" not in module.__dict__ and _trained(module) == {"weight"}


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is a convolution with a trained weight, and a bias at most that is trained beside it."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or "forward" in module.__dict__:
        return False
    return isinstance(module.weight, nn.Parameter) and {"weight"} <= _trained(module) <= {"weight", "bias"}


def _trained(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def _reason(
    name: str, module: nn.Module, uses: Counter[int], target_modules: Modules, exclude_modules: Modules
) -> tuple[str | None, LayerKernel | None]:
    kernel = kernel_for(module)
    if kernel is None:
        return f"{type(module).__name__} is not a preconditioned layer type", None
    weight = module.weight
    if not isinstance(weight, nn.Parameter):
        return "the layer's weight is computed from other parameters (as by pruning or weight normalization)", None
    if not weight.requires_grad:
        return "the layer's weight is frozen", None
    if any(uses[id(parameter)] > 1 for parameter in module.parameters(recurse=False)):
        return TIED, kernel
    if not _matches(name, target_modules) and target_modules != ALL_LINEAR:
        return "not among target_modules", None
    if _matches(name, exclude_modules):
        return "among exclude_modules", None
    return None, kernel


def _matches(name: str, modules: Modules) -> bool:
    if modules is None:
        return False
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(name == module or name.endswith(f".{module}") for module in modules)


def _check_targets(names: Sequence[str], argument: str, modules: Modules) -> None:
    if modules is None or isinstance(modules, str):
        return
    for module in modules:
        if not any(_matches(name, [module]) for name in names):
            raise ValueError(
                f"{argument} lists {module!r}, which is no module of the model; its modules are named like "
                f"{', '.join(repr(name) for name in names[1:6])}"
            )
