"""FNGD's arguments: what each may be, checked in one place.

The optimizer and its config both call :func:`validate`, so that a value is accepted, or refused in the same
words, wherever it is given. This is the lowest layer of the package: plain Python values only.
"""

import difflib
import math
import re
import reprlib
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType

SHARING = ("replay", "last", "ranked", "index", "uniform", "never")
STEP_SCALES = ("rms", "ngd")
UPDATES = ("momentum", "adam", "muon")
FALLBACKS = ("adamw", "sgd")

ALL_LINEAR = "all-linear"
REALS = ("lr", "momentum", "damping", "weight_decay", "fallback_lr", "beta2", "eps")
"""The arguments that are real numbers: an int is accepted for them and means the float of its value."""

# Counters and sizes end up in int64 tensors and checkpoints.
MAX_INTEGER = 2**63 - 1
# A config may come from anyone: these are far above any model's needs and keep a hostile one cheap to refuse.
MAX_CHARACTERS = 10_000
MAX_NAMES = 10_000

_Check = Callable[[str, object], None]


class _Shortened(reprlib.Repr):
    """Write a value for an error message, cut to a readable length."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80

    def repr_int(self, x: int, level: int) -> str:
        if abs(x) > MAX_INTEGER:
            return f"<an integer of {x.bit_length()} bits>"  # Python refuses to write the very long ones
        return super().repr_int(x, level)


_shown = _Shortened().repr


def _guess(name: object, names: Collection[str]) -> str:
    """Name what a misspelt name was probably meant to be; empty where nothing comes close."""
    close = difflib.get_close_matches(str(name)[:100], names, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def _wrong_type(key: str, value: object, accepted: str) -> TypeError:
    return TypeError(f"{key} must be {accepted}, got {_shown(value)} of type {type(value).__name__}")


def _wrong_value(key: str, value: object, accepted: str) -> ValueError:
    return ValueError(f"{key} must be {accepted}, got {_shown(value)}")


def _real(accepted: str, holds: Callable[[float], bool]) -> _Check:
    def check(key: str, value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong_type(key, value, accepted)
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or not holds(number):
            raise _wrong_value(key, value, accepted)

    return check


def _integer(lowest: int) -> _Check:
    accepted = f"an integer from {lowest} to {MAX_INTEGER}"

    def check(key: str, value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise _wrong_type(key, value, accepted)
        if not lowest <= value <= MAX_INTEGER:
            raise _wrong_value(key, value, accepted)

    return check


def _choice(names: Collection[str]) -> _Check:
    accepted = "one of " + ", ".join(map(repr, names))

    def check(key: str, value: object) -> None:
        if not isinstance(value, str):
            raise _wrong_type(key, value, accepted)
        if value not in names:
            raise ValueError(f"{key} must be {accepted}, got {_shown(value)}{_guess(value, names)}")

    return check


def _flag(key: str, value: object) -> None:
    if not isinstance(value, bool):
        raise _wrong_type(key, value, "True or False")


def _text(key: str, value: object, accepted: str) -> None:
    if not isinstance(value, str):
        raise _wrong_type(key, value, accepted)
    if not 0 < len(value) <= MAX_CHARACTERS:
        raise _wrong_value(key, value, f"{accepted}, of 1 to {MAX_CHARACTERS} characters")


def _modules(accepted: str, fewest: int) -> _Check:
    def check(key: str, value: object) -> None:
        if isinstance(value, list | tuple):
            if not fewest <= len(value) <= MAX_NAMES:
                raise ValueError(f"{key} must hold {fewest} to {MAX_NAMES} module names, got {len(value)}")
            for index, name in enumerate(value):
                _text(f"{key}[{index}]", name, "a module's name")
            return
        _text(key, value, accepted)
        try:
            re.compile(str(value))
        except (re.error, OverflowError, RecursionError) as error:
            reason = f"this regular expression does not compile: {error}"
            raise ValueError(f"{key} must be {accepted}, got {_shown(value)}; {reason}") from error

    return check


def _or_none(check: _Check) -> _Check:
    def check_unless_none(key: str, value: object) -> None:
        if value is not None:
            check(key, value)

    return check_unless_none


_LINEAR_OR_NAMES = f"{ALL_LINEAR!r}, a regular expression or a list of module names"
_CHECKS: Mapping[str, _Check] = MappingProxyType(
    {
        "lr": _real("a finite number >= 0", lambda x: x >= 0),
        "momentum": _real("a number >= 0 and < 1", lambda x: 0 <= x < 1),
        "damping": _real("a finite number > 0", lambda x: x > 0),
        "weight_decay": _real("a finite number >= 0", lambda x: x >= 0),
        "sharing": _choice(SHARING),
        "refresh": _integer(0),
        "coefficient_steps": _integer(1),
        "step_scale": _choice(STEP_SCALES),
        "update": _choice(UPDATES),
        "fallback": _choice(FALLBACKS),
        "fallback_lr": _or_none(_real("None (that is, lr) or a finite number >= 0", lambda x: x >= 0)),
        "beta2": _real("a number >= 0 and < 1", lambda x: 0 <= x < 1),
        "eps": _real("a finite number > 0", lambda x: x > 0),
        "memory_budget": _integer(1),
        "target_modules": _modules(_LINEAR_OR_NAMES, fewest=1),
        "exclude_modules": _or_none(_modules("None, a regular expression or a list of module names", fewest=0)),
        "strict": _flag,
    }
)

ARGUMENTS = tuple(_CHECKS)
"""The names of FNGD's arguments, the model aside, in the order of its signature."""


def validate(values: Mapping[str, object], *, choices: Mapping[str, Collection[str]] = MappingProxyType({})) -> None:
    """Check values of FNGD's arguments.

    The first value that is refused raises; nothing is converted or changed. An ``int`` is a fine value for a
    real number, a ``bool`` is not a number, and neither nan nor an infinity is accepted anywhere.

    Args:
        values: Values by argument name, any subset of ``ARGUMENTS``.
        choices: Allowed names of ``sharing``, ``update``, ``step_scale`` or ``fallback`` where they differ
            from this module's, such as a registry that holds a user's policy.

    Raises:
        TypeError: A value has the wrong type. The message names the argument, the value and what is accepted.
        ValueError: A value has the right type and is out of range, or a name is not an argument of FNGD's.
    """
    checks = {**_CHECKS, **{key: _choice(names) for key, names in choices.items()}}
    for key, value in values.items():
        if key not in checks:
            raise ValueError(
                f"FNGD has no argument {_shown(key)}, it has {', '.join(ARGUMENTS)}{_guess(key, ARGUMENTS)}"
            )
        checks[key](key, value)
