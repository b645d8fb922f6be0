"""Which layers of a model are attached, and why the others are not."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import regex
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_fngd.checks import guess, shown
from hf_fngd.layers.base import LayerKernel, Matrices, MatrixKernel, find_kernel, layer_type_names
from hf_fngd.layers.convolution import CONVOLUTIONS
from hf_fngd.layers.linear import MATRICES, LinearKernel
from hf_fngd.layers.modules import is_frozen, may_train, to_train, weight_of
from hf_fngd.layers.subclass import refusal
from hf_fngd.layers.table import TableKernel
from hf_fngd.layers.unweighed import unweighed_matrices

ALL_LINEAR = "all-linear"
Modules = str | Sequence[str] | None
# Of the layer types that are matrices.
_BASES: dict[str, tuple[type[nn.Module], ...]] = {
    "linear": MATRICES[:1],
    "conv1d": MATRICES[1:],
    "convolution": CONVOLUTIONS,
}

TIED = "the weight is tied to another module"
COMPUTED = "the layer's weight is computed from other parameters (as by pruning or weight normalization)"
FROZEN = "the layer's weight is frozen"
COUPLES = (
    "its statistics couple the samples; in the layers before it a sample's gradient is what comes through its own "
    "entries, its effect on the other samples included"
)
# In seconds. A pattern may come from anyone, with a shared config, so no match may take longer.
_PATTERN_TIMEOUT = 1.0


@dataclass(frozen=True)
class Selected:
    """A layer to attach."""

    name: str
    module: nn.Module
    kernel: LayerKernel
    preconditioned: bool  # whether the update rule steps it, the fallback rule steps the others
    names: Mapping[str, Sequence[str]]  # for each of its own parameters, all names that it has in the model

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of its parameters that are trained now."""
        live = (names for leaf, names in self.names.items() if _is_live(self.module, leaf))
        return tuple(itertools.chain.from_iterable(live))


@dataclass(frozen=True)
class Plain:
    """A parameter that belongs to no preconditioned layer, and why."""

    module: nn.Module
    leaf: str  # its name in the module
    reason: str
    unfit: bool  # whether it is a matrix that no layer type takes, though nobody excluded it


@dataclass(frozen=True)
class Selection:
    """Which layers are preconditioned and attached. Frozen layers are included, since they may be unfrozen.

    Attributes:
        preconditioned: the layers that the update rule steps.
        attached: all layers whose samples are weighed, the preconditioned ones first.
        others: the parameters outside the preconditioned layers, by name.
        unweighed: those of the others that consist of matrices all the same, by name (`unweighed_matrices`).
    """

    preconditioned: list[Selected]
    attached: list[Selected]
    others: dict[str, Plain]
    unweighed: dict[str, Matrices]

    @property
    def unfit(self) -> dict[str, str]:
        """The trained matrices that no layer type takes though nobody excluded them, and why; by name."""
        return {name: one.reason for name, one in self.others.items() if one.unfit and _is_live(one.module, one.leaf)}

    @property
    def plain(self) -> dict[str, str]:
        """The trained parameters that belong to no preconditioned layer, and why; by name."""
        found = {name: one.reason for name, one in self.others.items() if _is_live(one.module, one.leaf)}
        for layer in self.preconditioned:
            if is_frozen(layer.module):
                found |= dict.fromkeys(layer.parameters, FROZEN)
        return found


def _is_live(module: nn.Module, leaf: str) -> bool:
    """Whether a module's parameter is trained now, or was replaced by a tensor that is computed from others."""
    parameter = module._parameters.get(leaf)
    return parameter is None or parameter.requires_grad


def select_layers(
    model: nn.Module,
    target_modules: Modules,
    exclude_modules: Modules,
    layer_types: Collection[str] | None = None,
    *,
    solves: bool = False,
) -> Selection:
    """Choose the layers to attach; for the arguments see `hf_fngd.settings.Settings`.

    A Linear, Conv1D or convolution is preconditioned if its weight belongs to it alone (a tied output head shares its
    weight with an embedding), ``target_modules`` names it and ``exclude_modules`` does not. Another layer is attached
    if its type is registered, unless the sharing policy ``solves``: then it would have to form Gram matrices. A weight
    that several modules share is weighed in all of them, or in none. Frozen layers are selected as if they were
    trained.

    Raises:
        ValueError: a listed module matches none of the model's, or nothing that is trained now is left to precondition.
    """
    known: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known[id(parameter)].append(name)
    of_tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    uses = Counter(id(parameter) for module in model.modules() for parameter in to_train(module).values())
    wanted = set(layer_type_names(default=True) if layer_types is None else layer_types)
    preconditioned: list[Selected] = []
    others: list[Selected] = []
    plain: dict[str, Plain] = {}
    unweighed: dict[str, Matrices] = {}
    _check_names(model, target_modules=target_modules, exclude_modules=exclude_modules)
    for name, module in model.named_modules():
        layer_type, kernel = find_kernel(module)
        excluded = matches(name, exclude_modules)
        named = target_modules == ALL_LINEAR or matches(name, target_modules)
        unwanted = layer_type not in wanted and (
            isinstance(kernel, MatrixKernel) or (kernel is not None and not solves)
        )
        kernel = kernel if layer_type in wanted else None
        reason = _reason(module, kernel, uses, named, excluded)
        if unwanted and not excluded:
            reason = f"{type(module).__name__}: {layer_type!r} is not among layer_types"
        names = {leaf: known[id(parameter)] for leaf, parameter in to_train(module).items()}
        if reason is None and kernel is not None:
            preconditioned.append(Selected(name, module, kernel, True, names))
            continue
        if kernel is not None and not excluded and (_trains_alone(module, kernel) or reason == TIED):
            if isinstance(kernel, LinearKernel) and id(module.weight) in of_tables:
                kernel = replace(kernel, tied=True)
            others.append(Selected(name, module, kernel, False, names))
        left_out = any(isinstance(module, bases) for of, bases in _BASES.items() if of not in wanted)
        if layer_type is None and named and not excluded and not left_out:
            alone = {
                leaf: n for leaf, n in unweighed_matrices(module).items() if uses[id(module._parameters[leaf])] == 1
            }
            unweighed |= {known[id(module._parameters[leaf])][0]: n for leaf, n in alone.items()}
        none = reason == COMPUTED or (layer_type is None and not excluded)
        for leaf in names:
            unfit = none and module.get_parameter(leaf).dim() > 1
            plain.setdefault(f"{name}.{leaf}" if name else leaf, Plain(module, leaf, reason or "", unfit))
    if all(is_frozen(layer.module) for layer in preconditioned):
        refused = [
            f"{name or 'the model'} ({type(module).__name__}: {why})"
            for name, module in model.named_modules()
            if (why := refusal(module, *MATRICES, *CONVOLUTIONS))
        ]
        refused += [f"{name}: {one.reason}" for name, one in plain.items() if one.reason in (TIED, COMPUTED)]
        raise ValueError(
            "nothing to precondition: the model has no trainable torch.nn.Linear, transformers Conv1D or convolution, "
            f"nor a subclass that computes the same, that target_modules={shown(target_modules)}, "
            f"exclude_modules={shown(exclude_modules)} and layer_types={layer_types!r} select"
            + (f"; not taken: {', '.join(refused[:3])}" if refused else "")
            + (
                f"; {len(preconditioned)} are frozen, and one has to be trained when FNGD is built"
                if preconditioned
                else ""
            )
            + ". Where an adapter trains no such layer, as IA3 and prompt tuning do not, AdamW is the optimizer for it"
        )
    among = Counter(id(weight_of(layer.module)) for layer in others)
    others = [layer for layer in others if among[id(weight_of(layer.module))] == uses[id(weight_of(layer.module))]]
    return Selection(preconditioned, preconditioned if solves else preconditioned + others, plain, unweighed)


def refuse_unfit(selection: Selection) -> None:
    """Raise ValueError where samples cannot be weighed in a matrix, though nobody excluded it."""
    if found := selection.unfit:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in list(found.items())[:4])
        raise ValueError(
            f"strict=True: {len(found)} matrices cannot be weighed: {reasons}. Name their modules in exclude_modules, "
            "or set strict=False"
        )


def refuse_complex(selection: Selection) -> None:
    """Raise ValueError where a layer to attach has a complex weight, since no kernel handles these."""
    weights = {layer.name: weight_of(layer.module) for layer in selection.attached}
    if found := [name for name, weight in weights.items() if weight is not None and weight.is_complex()]:
        raise ValueError(
            f"the weights of {len(found)} layers are complex, and FNGD weighs samples in real ones alone: leave them "
            f"out by exclude_modules={found}"
        )


def _trains_alone(module: nn.Module, kernel: LayerKernel) -> bool:
    """Whether a layer that is no matrix trains a weight, and beside it nothing but a bias."""
    if isinstance(kernel, MatrixKernel) or "forward" in module.__dict__:
        return False
    if isinstance(kernel, TableKernel):
        return True
    frozen = is_frozen(module)
    names = {name for name, p in module.named_parameters() if p.requires_grad or (frozen and may_train(p))}
    return isinstance(getattr(module, "weight", None), nn.Parameter) and {"weight"} <= names <= {"weight", "bias"}


def _reason(
    module: nn.Module, kernel: LayerKernel | None, uses: Counter[int], named: bool, excluded: bool
) -> str | None:
    """Why a module is not preconditioned; None where it is."""
    if excluded:
        return "among exclude_modules"
    if not isinstance(kernel, MatrixKernel):
        why = COUPLES if isinstance(module, _BatchNorm) else refusal(module, *MATRICES, *CONVOLUTIONS)
        return f"{type(module).__name__} is not a preconditioned layer type" + (f": {why}" if why else "")
    weight = module.weight
    if not isinstance(weight, nn.Parameter):
        return COMPUTED
    if not may_train(weight):
        return FROZEN
    own = [p for p in module.parameters(recurse=False) if p.requires_grad or not weight.requires_grad]
    if any(uses[id(parameter)] > 1 for parameter in own):
        return TIED
    return None if named else "not among target_modules"


def matches(name: str, modules: Modules) -> bool:
    """Whether a module's name matches a regular expression, or it or a module that holds it is one of a list of names.

    A name in a list is whole, or the last dotted parts of one.
    """
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
    holders = [f".{part}" for part in itertools.accumulate(name.split("."), "{}.{}".format)]
    return any(holder.endswith(f".{module}") for holder in holders for module in modules)


def _check_names(model: nn.Module, **arguments: Modules) -> None:
    names = [name for name, _ in model.named_modules()]
    for argument, modules in arguments.items():
        if (
            argument == "exclude_modules"
            and isinstance(modules, str)
            and not any(matches(name, modules) for name in names)
        ):
            raise ValueError(
                f"exclude_modules={shown(modules)} matches the whole name of no module; {_are_named(names)}"
            )
        for module in () if modules is None or isinstance(modules, str) else modules:
            if not any(matches(name, [module]) for name in names):
                ends = sorted({name.rpartition(".")[2] for name in names} - {""})
                raise ValueError(
                    f"{argument} lists {module!r}, which is no module of the model{guess(module, [*ends, *names])}; "
                    + _are_named(names)
                )


def _are_named(names: Sequence[str]) -> str:
    return f"its modules are named like {', '.join(map(repr, names[1:6]))}"
