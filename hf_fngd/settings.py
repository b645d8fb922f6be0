"""FNGD's arguments: names, defaults, checks and help, in one place.

`FNGD`, `FNGDPreconditioner`, `FNGDConfig`, the recipes' options and the documentation derive from `Settings`.
"""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from hf_fngd.checks import Check, choice, flag, guess, integer, modules, real, shown, wrong_type
from hf_fngd.layers.base import layer_type_names
from hf_fngd.layers.select import ALL_LINEAR
from hf_fngd.updates import FALLBACK_RULES, RULES
from hf_fngd.weights.base import SharingPolicy, policy_class, policy_names

Class = TypeVar("Class", bound=type)


def _sharing(key: str, value: Any) -> Any:
    return value if isinstance(value, SharingPolicy) else choice(policy_names)(key, value)


def _layer_types(key: str, value: Any) -> list[str]:
    if not isinstance(value, list | tuple) or not value:
        raise wrong_type(key, value, f"None or a list of some of {', '.join(map(repr, layer_type_names()))}")
    return [choice(layer_type_names)(f"{key}[{index}]", name) for index, name in enumerate(value)]


def _setting(default: Any, check: Check, text: str, *, unset: Any = None, engine: bool = False) -> Any:
    """A field of `Settings`.

    Args:
        default: its default; where that is None, None is accepted beside what the check accepts.
        check: see `Check`.
        text: the help.
        unset: what None means to who reads it.
        engine: whether it is an argument of `FNGDPreconditioner` too.
    """
    return field(default=default, metadata={"help": text, "check": check, "unset": unset, "engine": engine})


_NAMES = "a regular expression or a list of module names"


@dataclass(frozen=True)
class Settings:
    """The arguments of `FNGD`, the model aside.

    Raises:
        TypeError: a value has the wrong type. The message names the argument, the value and what is accepted.
        ValueError: a value is out of range, or nothing reads it under the other settings.
    """

    lr: float = _setting(
        1e-3,
        real("a finite number >= 0", lambda x: x >= 0),
        "Learning rate, >= 0. The root mean square of an update is 0.2 lr with update 'muon', about lr with 'adam', "
        "and at most lr with 'momentum', before momentum.",
    )
    momentum: float = _setting(
        0.9, real("a number >= 0 and < 1", lambda x: 0 <= x < 1), "Decay of the first moment, in [0, 1)."
    )
    weight_decay: float = _setting(
        0.0, real("a finite number >= 0", lambda x: x >= 0), "Decoupled weight decay, >= 0; none on biases and norms."
    )
    sharing: str = _setting(  # or a SharingPolicy, for FNGD and FNGDPreconditioner
        "clipped",
        _sharing,
        "Which sample weights a step has. 'clipped': each sample's gradient is brought down to the mean norm of its "
        "batch, layer by layer. 'uniform': all are 1. 'never': those of natural gradient descent (Eq. 9 of arXiv "
        "2403.03473), solved anew in every step. 'replay': those of the first epoch, as in the paper.",
        engine=True,
    )
    damping: float | None = _setting(
        None,
        real("None or a finite number > 0", lambda x: x > 0),
        "alpha > 0 of lambda = alpha ||K||_F (Eq. 14), dimensionless; None: 0.1. Read by sharing 'never' and 'replay'.",
        unset=0.1,
        engine=True,
    )
    coefficient_steps: int | None = _setting(
        None,
        integer(1),
        "Most optimizer steps of the first epoch that solve for sample weights, >= 1; None: the whole epoch. Read by "
        "sharing 'replay'.",
        engine=True,
    )
    update: str = _setting(
        "muon",
        choice(lambda: tuple(RULES)),
        "Update rule of the preconditioned layers, Linear and Conv1D: 'muon', 'adam', or 'momentum', the paper's step "
        "of 1/lambda' within a trust region, for sharing 'never' and 'replay'.",
    )
    fallback: str = _setting(
        "adamw", choice(lambda: tuple(FALLBACK_RULES)), "Update rule of all other parameters: 'adamw' or 'sgd'."
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
        unset=0.999,
    )
    eps: float | None = _setting(
        None,
        real("None or a finite number > 0", lambda x: x > 0),
        "Term > 0 in the denominator of update 'adam' and fallback 'adamw'; None: 1e-8.",
        unset=1e-8,
    )
    memory_budget: int | None = _setting(
        None,
        integer(1),
        "Bound in bytes of the stored sample weights, and of a coefficient step's temporary memory; None: 2**28. Read "
        "by sharing 'never' and 'replay'.",
        unset=2**28,
        engine=True,
    )
    target_modules: str | list[str] = _setting(  # noqa: RUF009
        ALL_LINEAR,
        modules(f"{ALL_LINEAR!r}, {_NAMES}", fewest=1),
        "Linear and Conv1D layers to precondition: 'all-linear', a regular expression that matches the whole name, or "
        "a list of names or dotted suffixes (PEFT's).",
        engine=True,
    )
    exclude_modules: str | list[str] | None = _setting(  # noqa: RUF009
        None,
        modules(f"None, {_NAMES}", fewest=0),
        "Layers of any type to leave plain: None, a regular expression or a list, as in target_modules.",
        engine=True,
    )
    layer_types: list[str] | None = _setting(  # noqa: RUF009
        None,
        _layer_types,
        "Types of layers whose samples are weighed: a list of some of 'linear', 'conv1d', 'embedding', 'convolution', "
        "'norm' and 'table'; None: all of them but 'norm'.",
        engine=True,
    )
    strict: bool = _setting(
        False, flag, "Raise where the coverage report would only tell of a layer that cannot be weighed.", engine=True
    )

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(Settings):
            value = getattr(self, setting.name)
            if value is not None or setting.default is not None:
                object.__setattr__(self, setting.name, setting.metadata["check"](setting.name, value))
        policy = policy_class(self.sharing)
        for name in ("damping", "coefficient_steps", "memory_budget"):
            if getattr(self, name) is not None and name not in policy.reads:
                readers = policy_names(lambda other, name=name: name in other.reads)  # type: ignore[misc]
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect with sharing={policy.name!r}: leave it out, or use "
                    f"sharing={' or '.join(map(repr, readers))}, which read it"
                )
        for name in ("beta2", "eps"):
            if getattr(self, name) is not None and self.update == "momentum" and self.fallback == "sgd":
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect with update='momentum' and fallback='sgd': leave it "
                    "out, or use update='adam' or fallback='adamw', which read it"
                )
        if self.update == "momentum" and not policy.solves:
            readers = policy_names(lambda other: other.solves)
            raise ValueError(
                f"update='momentum' steps by the paper's 1/lambda', which sharing={policy.name!r} does not measure: "
                f"use update='muon' or 'adam', or sharing={' or '.join(map(repr, readers))}"
            )

    @classmethod
    def of(cls, owner: str, values: Mapping[str, Any], names: Collection[str] | None = None) -> Self:
        """Build from keyword arguments.

        Args:
            owner: whose arguments they are, for the message.
            values: the arguments by name.
            names: those that the owner has; None for all.

        Raises:
            TypeError: an argument does not exist; the message names those that do.
        """
        names = setting_names() if names is None else names
        for key in values:
            if key not in names:
                raise TypeError(f"{owner} has no argument {shown(key)}, it has {', '.join(names)}{guess(key, names)}")
        return cls(**values)

    def effective(self, name: str) -> Any:
        """The value of an argument; where it is None, what None means."""
        value = getattr(self, name)
        return _fields()[name].metadata["unset"] if value is None else value

    def values(self, names: Collection[str] | None = None) -> dict[str, Any]:
        """The arguments by name, all of them or those named."""
        return {name: getattr(self, name) for name in (setting_names() if names is None else names)}


def _fields() -> dict[str, dataclasses.Field[Any]]:
    return {setting.name: setting for setting in dataclasses.fields(Settings)}


def setting_names(engine: bool = False) -> tuple[str, ...]:
    """The names of the arguments: all of FNGD's, or those of the engine alone."""
    return tuple(name for name, setting in _fields().items() if setting.metadata["engine"] or not engine)


def with_settings(*, engine: bool) -> Callable[[Class], Class]:
    """Class decorator: give the signature and the docstring the arguments that ``**settings`` stands for.

    Args:
        engine: whether it takes those of the engine alone.
    """

    def decorate(cls: Class) -> Class:
        init: Any = vars(cls)["__init__"]
        signature = inspect.signature(init)
        kept = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        fields = [_fields()[name] for name in setting_names(engine) if name not in signature.parameters]
        added = [inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default) for f in fields]
        init.__signature__ = signature.replace(parameters=[*kept, *added])
        lines = [
            textwrap.fill(f"{f.name}: {f.metadata['help']}", 116, initial_indent=" " * 4, subsequent_indent=" " * 8)
            for f in fields
        ]
        cls.__doc__ = inspect.cleandoc(cls.__doc__ or "").replace("    **settings: see `Settings`.", "\n".join(lines))
        return cls

    return decorate
