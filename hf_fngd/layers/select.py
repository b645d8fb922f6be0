"""Which layers of a model are attached, and why the others are not."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import regex
from torch import nn

from hf_fngd.checks import shown
from hf_fngd.layers.base import GramKernel, LayerKernel, find_kernel, layer_type_names, trained, weight_of
from hf_fngd.layers.convolution import CONVOLUTIONS
from hf_fngd.layers.linear import MATRICES, LinearKernel
from hf_fngd.layers.subclass import refusal
from hf_fngd.layers.table import TableKernel

ALL_LINEAR = "all-linear"
Modules = str | Sequence[str] | None
TIED = "the weight is tied to another module"
COMPUTED = "the layer's weight is computed from other parameters (as by pruning or weight normalization)"
# A pattern may come from anyone, with a shared config: no match of a name takes longer than this, in seconds.
_PATTERN_TIMEOUT = 1.0


@dataclass(frozen=True)
class Selected:
    """A layer to attach."""

    name: str
    module: nn.Module
    kernel: LayerKernel
    matrix: bool  # a Linear or Conv1D with a weight of its own: it gets the update rule, all others the fallback rule
    parameters: tuple[str, ...]  # all names in the model of those that it trains itself


@dataclass(frozen=True)
class Selection:
    """The preconditioned layers; all layers to attach, these first; and why each other parameter is another.

    ``unfit`` has those matrices among the others that no layer type takes, and nobody left out.
    """

    matrices: list[Selected]
    layers: list[Selected]
    plain: dict[str, str]
    unfit: tuple[str, ...]


def select_layers(
    model: nn.Module,
    target_modules: Modules,
    exclude_modules: Modules,
    layer_types: Collection[str] | None = None,
    *,
    solves: bool = False,
) -> Selection:
    """Choose the layers to attach; for the arguments see `hf_fngd.settings.Settings`.

    A Linear or Conv1D is preconditioned if its weight is trained and belongs to it alone (a tied output head shares its
    weight with an embedding), ``target_modules`` names it and ``exclude_modules`` does not. Of the other layers those
    are attached whose type is registered, and none where the sharing policy ``solves``, for which they would have to
    form Gram matrices. A weight that several modules share is weighed with all of them, or with none.

    Raises:
        ValueError: a listed module matches none of the model's, or nothing is left to precondition.
    """
    known: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known[id(parameter)].append(name)
    uses = Counter(id(parameter) for module in model.modules() for parameter in trained(module).values())
    wanted = set(layer_type_names(default=True) if layer_types is None else layer_types)
    matrices: list[Selected] = []
    others: list[Selected] = []
    plain: dict[str, str] = {}
    unfit: list[str] = []
    _check_listed(model, target_modules=target_modules, exclude_modules=exclude_modules)
    for name, module in model.named_modules():
        layer_type, kernel = find_kernel(module)
        if layer_type not in wanted:
            kernel = None
        excluded = matches(name, exclude_modules)
        named = target_modules == ALL_LINEAR or matches(name, target_modules)
        reason = _reason(module, kernel, uses, named, excluded)
        own = trained(module)
        parameters = tuple(itertools.chain.from_iterable(known[id(parameter)] for parameter in own.values()))
        if reason is None and kernel is not None:
            matrices.append(Selected(name, module, kernel, True, parameters))
            continue
        if kernel is not None and not excluded and (_trains_alone(module, kernel) or reason == TIED):
            kernel = replace(kernel, tied=True) if isinstance(kernel, LinearKernel) else kernel
            others.append(Selected(name, module, kernel, False, parameters))
        for leaf in own:
            plain.setdefault(f"{name}.{leaf}" if name else leaf, reason or "")
        if reason == COMPUTED or (layer_type is None and not excluded):
            unfit += [f"{name}.{leaf}" if name else leaf for leaf, parameter in own.items() if parameter.dim() > 1]
    if not matrices:
        refused = [
            f"{name or 'the model'} ({type(module).__name__}: {why})"
            for name, module in model.named_modules()
            if (why := refusal(module, *MATRICES))
        ]
        raise ValueError(
            "nothing to precondition: the model has no trainable torch.nn.Linear or transformers Conv1D, nor a "
            f"subclass that computes the same, that target_modules={shown(target_modules)}, "
            f"exclude_modules={shown(exclude_modules)} and layer_types={layer_types!r} select"
            + (f"; not taken: {', '.join(refused[:3])}" if refused else "")
        )
    among = Counter(id(weight_of(layer.module)) for layer in others)
    others = [layer for layer in others if among[id(weight_of(layer.module))] == uses[id(weight_of(layer.module))]]
    return Selection(matrices, matrices if solves else matrices + others, plain, tuple(unfit))


def _trains_alone(module: nn.Module, kernel: LayerKernel) -> bool:
    """Whether a layer that is no matrix has a trained weight, and a bias at most that is trained beside it."""
    if isinstance(kernel, GramKernel) or "forward" in module.__dict__:
        return False
    if isinstance(kernel, TableKernel):
        return True
    names = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    return isinstance(getattr(module, "weight", None), nn.Parameter) and {"weight"} <= names <= {"weight", "bias"}


def _reason(
    module: nn.Module, kernel: LayerKernel | None, uses: Counter[int], named: bool, excluded: bool
) -> str | None:
    """Why a module is not preconditioned; None where it is."""
    if excluded:
        return "among exclude_modules"
    if not isinstance(kernel, GramKernel):
        why = refusal(module, *MATRICES, *CONVOLUTIONS)
        return f"{type(module).__name__} is not a preconditioned layer type" + (f": {why}" if why else "")
    weight = module.weight
    if not isinstance(weight, nn.Parameter):
        return COMPUTED
    if not weight.requires_grad:
        return "the layer's weight is frozen"
    if any(uses[id(parameter)] > 1 for parameter in module.parameters(recurse=False)):
        return TIED
    return None if named else "not among target_modules"


def matches(name: str, modules: Modules) -> bool:
    """Whether a regular expression, or one of some names or dotted suffixes, matches the name of a module."""
    if modules is None:
        return False
    if isinstance(modules, str):
        try:
            return regex.fullmatch(modules, name, timeout=_PATTERN_TIMEOUT) is not None
        except TimeoutError as error:
            raise ValueError(
                f"the regular expression {modules[:80]!r} took longer than {_PATTERN_TIMEOUT:g} s to match the module "
                f"name {name[:80]!r}: use no repetition of repetitions such as '(a+)+', or list the names"
            ) from error
    return any(name == module or name.endswith(f".{module}") for module in modules)


def _check_listed(model: nn.Module, **arguments: Modules) -> None:
    names = [name for name, _ in model.named_modules()]
    for argument, modules in arguments.items():
        for module in () if modules is None or isinstance(modules, str) else modules:
            if not any(matches(name, [module]) for name in names):
                raise ValueError(
                    f"{argument} lists {module!r}, which is no module of the model; its modules are named like "
                    f"{', '.join(map(repr, names[1:6]))}"
                )
