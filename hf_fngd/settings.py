"""FNGD's arguments: names, defaults, checks and help, from which signatures, configs and documentation derive."""

import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from hf_fngd.checks import NOT_NEGATIVE, Check, choice, flag, guess, integer, modules, real, shown, wrong_type
from hf_fngd.layers.base import layer_type_names
from hf_fngd.layers.select import ALL_LINEAR
from hf_fngd.updates import FALLBACK_RULES, RULES
from hf_fngd.updates.base import RATE, RATE_OF_ADAPTERS
from hf_fngd.updates.block_muon import FEWEST, PRICE
from hf_fngd.updates.chosen import chosen_groups
from hf_fngd.updates.orthogonal import STEPS
from hf_fngd.weights.base import SharingPolicy, policy_class, policy_names

Class = TypeVar("Class", bound=type)


def _sharing(key: str, value: Any) -> Any:
    return value if isinstance(value, SharingPolicy) else choice(policy_names())(key, value)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _layer_types(key: str, value: Any) -> list[str]:
    if not isinstance(value, list | tuple) or not value:
        raise wrong_type(key, value, f"None or a list of some of {_quoted(layer_type_names())}")
    return [choice(layer_type_names())(f"{key}[{index}]", name) for index, name in enumerate(value)]


def _setting(default: Any, check: Check, text: str) -> Any:
    """A field of `Settings`; where its default is None, None is accepted beside what the check accepts."""
    return field(default=default, metadata={"help": text, "check": check})


_NONE_OR_POSITIVE = real("None or a finite number > 0", lambda x: x > 0)
_NAMES = "a regular expression or a list of module names"
# What only some policies, or some update rules, read: where nothing does, a value is an error.
READ_BY_POLICIES = ("damping", "coefficient_steps", "memory_budget")
READ_BY_RULES = ("beta2", "eps", "block_size", "ns_steps")
_OF_ENGINE = ("sharing", *READ_BY_POLICIES, "target_modules", "exclude_modules", "layer_types", "strict", "batch_dim")
# What other optimizers call some of them.
_ELSEWHERE = {"learning_rate": "lr", "betas": "momentum and beta2", "beta1": "momentum", "params": "the model"}
_MEANT_BY_NONE = {
    "lr": RATE,  # FNGD itself has looked at the model
    "damping": 0.1,
    "ns_steps": STEPS,
    "beta2": 0.999,
    "eps": 1e-8,
    "memory_budget": 2**28,
}


@dataclass(frozen=True)
class Settings:
    """The arguments of `FNGD`, the model aside.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of range, or nothing reads it under the other settings.
    """

    lr: float | None = _setting(
        None,
        real("None or a finite number >= 0", lambda x: x >= 0),
        f"Learning rate, >= 0; None: {RATE:g}, or {RATE_OF_ADAPTERS:g} where update 'block_muon' or 'muon' moves LoRA "
        "adapters. The root mean square of an update is 0.14 to 0.22 lr with these two, about lr with 'adam', and at "
        "most lr with 'momentum', before momentum.",
    )
    momentum: float = _setting(
        0.9, real("a number >= 0 and < 1", lambda x: 0 <= x < 1), "Decay of the first moment, in [0, 1)."
    )
    weight_decay: float = _setting(
        0.0,
        NOT_NEGATIVE,
        "Decoupled weight decay, >= 0; as Trainer's, none on biases, LayerNorms and what is called a norm, but on "
        "every preconditioned matrix.",
    )
    sharing: str = _setting(  # or a SharingPolicy, for FNGD and FNGDPreconditioner
        "clipped",
        _sharing,
        "Which sample weights a step has. 'clipped': each sample's gradient is brought down to the mean norm of the "
        "optimizer step's samples, layer by layer. 'uniform': all are 1. 'never': those of natural gradient descent "
        "(Eq. 9 of arXiv 2403.03473), solved anew in every step. 'replay': those of the first epoch, as in the paper.",
    )
    damping: float | None = _setting(
        None,
        _NONE_OR_POSITIVE,
        "alpha > 0 of lambda = alpha ||K||_F (Eq. 14), dimensionless; None: 0.1. Read by sharing 'never' and 'replay'.",
    )
    coefficient_steps: int | None = _setting(
        None,
        integer(1),
        "Most optimizer steps of the first epoch that solve for sample weights, >= 1; None: the whole epoch. Read by "
        "sharing 'replay'.",
    )
    update: str = _setting(
        "block_muon",
        choice(RULES),
        "Update rule of the preconditioned layers, Linear, Conv1D and convolutions: 'block_muon', which is Muon on "
        "blocks of rows, 'muon' on whole matrices, 'adam', or 'momentum', the paper's step of 1/lambda' within a trust "
        "region, for sharing 'never' and 'replay'. Muon also steps experts, and the projections of torch's attention.",
    )
    block_size: int | None = _setting(
        None,
        integer(1),
        f"Most rows of a block, >= 1; None: a quarter of the matrix's shorter side and at least {FEWEST}, and more "
        f"where orthogonalizing takes at most 1/{PRICE} of the operations of the layer's forward and backward. "
        "Read by update 'block_muon'.",
    )
    ns_steps: int | None = _setting(
        None, integer(1, 100), f"Newton-Schulz steps of update 'muon' and 'block_muon', >= 1; None: {STEPS}."
    )
    fallback: str = _setting(
        "adamw",
        choice(FALLBACK_RULES),
        "Update rule of all other parameters: 'adamw' or 'sgd'. With update 'muon' and 'block_muon' depthwise filters "
        "are among them, and output heads, unless target_modules names them or their group has an 'update'.",
    )
    fallback_lr: float | None = _setting(
        None,
        real("None (that is, lr) or a finite number >= 0", lambda x: x >= 0),
        "Learning rate of the fallback rule, >= 0; None: the same as lr.",
    )
    beta2: float | None = _setting(
        None,
        real("None or a number >= 0 and < 1", lambda x: 0 <= x < 1),
        "Decay of the second moment of update 'adam' and fallback 'adamw', in [0, 1); None: 0.999.",
    )
    eps: float | None = _setting(
        None, _NONE_OR_POSITIVE, "Term > 0 in the denominator of update 'adam' and fallback 'adamw'; None: 1e-8."
    )
    param_groups: list[dict[str, Any]] | None = _setting(  # noqa: RUF009
        None,
        chosen_groups,
        "Parameters with settings of their own: None or a list of dicts, each with 'params' and any of 'lr', "
        "'weight_decay' (then also of biases and norms) and 'update'. 'params' is a regular expression that matches a "
        "parameter's whole name, or a list of names of parameters or modules, or dotted suffixes; FNGD itself also "
        "takes Parameters.",
    )
    memory_budget: int | None = _setting(
        None,
        integer(1),
        "Bound in bytes of the stored sample weights, and of a coefficient step's temporary memory; None: 2**28. Read "
        "by sharing 'never' and 'replay'.",
    )
    target_modules: str | list[str] = _setting(  # noqa: RUF009
        ALL_LINEAR,
        modules(f"{ALL_LINEAR!r}, {_NAMES}", fewest=1),
        "Linear, Conv1D and convolution layers to precondition: 'all-linear', which is all of them, a regular "
        "expression that matches the whole name, or a list of names or dotted suffixes (PEFT's), of layers or of "
        "modules that hold them.",
    )
    exclude_modules: str | list[str] | None = _setting(  # noqa: RUF009
        None,
        modules(f"None, {_NAMES}", fewest=0),
        "Layers of any type to leave plain: None, a regular expression or a list, as in target_modules.",
    )
    layer_types: list[str] | None = _setting(  # noqa: RUF009
        None,
        _layer_types,
        f"Types of layers whose samples are weighed: a list of some of {_quoted(layer_type_names())}; None: all of "
        f"them but {_quoted(name for name in layer_type_names() if name not in layer_type_names(default=True))}.",
    )
    strict: bool = _setting(
        False, flag, "Raise where the coverage report would only tell of a layer that cannot be weighed."
    )

    batch_dim: int | None = _setting(
        None,
        integer(0, 1),
        "The dimension of the model's inputs that counts the samples, 0 or 1; None: found on the first training batch, "
        "by forward passes with a sample fewer.",
    )

    def __post_init__(self) -> None:
        for name, setting in Settings.__dataclass_fields__.items():
            value = getattr(self, name)
            if value is not None or setting.default is not None:
                object.__setattr__(self, name, setting.metadata["check"](name, value))
        policy = policy_class(self.sharing)
        for name, (chosen, others) in self._unread(policy).items():
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect with {chosen}: leave it out, or use {others}"
                )
        if "momentum" in self.updates and not policy.solves:
            solvers = policy_names(lambda other: other.solves)
            raise ValueError(
                f"update='momentum' steps by the paper's 1/lambda', which sharing={policy.name!r} does not measure: "
                f"use update='block_muon' or 'adam', or sharing={' or '.join(map(repr, solvers))}"
            )

    def _unread(self, policy: type[SharingPolicy]) -> dict[str, tuple[str, str]]:
        """The arguments that nothing reads, each with the settings that do not, and with others that would."""
        found = {}
        for name in READ_BY_POLICIES:
            if name not in policy.reads:
                readers = " or ".join(repr(other) for other in policy_names() if name in policy_class(other).reads)
                found[name] = (f"sharing={policy.name!r}", f"sharing={readers}")
        rules = {*self.updates, FALLBACK_RULES[self.fallback]}
        if any(RULES[rule].matrices for rule in rules):
            rules.add("adam")  # for the biases
        for name in READ_BY_RULES:
            if not any(name in RULES[rule].reads for rule in rules):
                updates = " or ".join(repr(rule) for rule in sorted(RULES) if name in RULES[rule].reads)
                fallbacks = " or ".join(repr(key) for key, rule in FALLBACK_RULES.items() if name in RULES[rule].reads)
                found[name] = (f"update={self.update!r}", f"update={updates}")
                if fallbacks:
                    chosen, others = found[name]
                    found[name] = f"{chosen} and fallback={self.fallback!r}", f"{others} or fallback={fallbacks}"
        return found

    @property
    def updates(self) -> set[str]:
        """The update rules of the preconditioned layers, those of the user's groups included."""
        return {self.update, *(group["update"] for group in self.param_groups or () if "update" in group)}

    @classmethod
    def of(cls, owner: str, values: Mapping[str, Any], engine: bool = False) -> Self:
        """Build from the keyword arguments of FNGD or, with ``engine``, of the engine, which the message names."""
        names = setting_names(engine)
        for key in values:
            if key not in names:
                meant = f"; use {_ELSEWHERE[key]}" if key in _ELSEWHERE else guess(key, names)
                raise TypeError(f"{owner} has no argument {shown(key)}, it has {', '.join(names)}{meant}")
        return cls(**values)

    def effective(self, name: str) -> Any:
        """The value of an argument; where it is None, what None means."""
        value = getattr(self, name)
        return _MEANT_BY_NONE.get(name) if value is None else value

    def values(self, engine: bool = False) -> dict[str, Any]:
        """The arguments by name: all of FNGD's, or those of the engine alone."""
        return {name: getattr(self, name) for name in setting_names(engine)}


def setting_names(engine: bool = False) -> tuple[str, ...]:
    """The names of the arguments: all of FNGD's, or those of the engine alone."""
    return _OF_ENGINE if engine else tuple(Settings.__dataclass_fields__)


def with_settings(*, engine: bool) -> Callable[[Class], Class]:
    """Class decorator: put the arguments that ``**settings`` stands for into the signature and the docstring."""

    def decorate(cls: Class) -> Class:
        init: Any = vars(cls)["__init__"]
        signature = inspect.signature(init)
        parameters = {name: p for name, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD}
        lines = []
        for name in setting_names(engine):
            of = Settings.__dataclass_fields__[name]
            parameters.setdefault(name, inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=of.default))
            text = f"{name}: {of.metadata['help']}"
            lines.append(textwrap.fill(text, 116, initial_indent=" " * 4, subsequent_indent=" " * 8))
        init.__signature__ = signature.replace(parameters=[*parameters.values()])
        cls.__doc__ = inspect.cleandoc(cls.__doc__ or "").replace("    **settings: see `Settings`.", "\n".join(lines))
        return cls

    return decorate
