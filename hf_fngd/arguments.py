"""FNGD's arguments: what each may be, checked in one place.

The optimizer and its config both call :func:`validate`, so that a value is accepted, or refused in the same
words, wherever it is given. This is the lowest layer of the package: plain Python values only.
"""

import difflib
import math
import re
import reprlib
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

SHARING = ("replay", "last", "ranked", "index", "uniform", "never", "sketched", "clipped")
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
# Python matches by trying: a pattern may have so many ways to match a name of this many characters, and so many
# characters in its ranges [a-z], which are compiled one by one.
MAX_WAYS = 10**6
NAME_LENGTH = 100
MAX_IN_RANGES = 2**16

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


def guess(name: object, names: Collection[str], text: str = "; did you mean {}?") -> str:
    """Name what a misspelt name was probably meant to be; empty where nothing comes close."""
    close = difflib.get_close_matches(name[:100], names, n=3, cutoff=0.6) if isinstance(name, str) else []
    return text.format(" or ".join(map(repr, close))) if close else ""


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


def _integer(lowest: int, also: str = "") -> _Check:
    accepted = f"{also}an integer from {lowest} to {MAX_INTEGER}"

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
            raise ValueError(f"{key} must be {accepted}, got {_shown(value)}{guess(value, names)}")

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
        if reason := _fault_of_pattern(str(value)):
            raise ValueError(f"{key} must be {accepted}, got {_shown(value)}; this regular expression {reason}")

    return check


def _fault_of_pattern(pattern: str) -> str | None:
    """Why a regular expression is refused; None where it compiles, and matches in bounded time."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # about sets such as [[a], which a later Python may read otherwise
            tree = re._parser.parse(pattern)  # type: ignore[attr-defined]  # trees have no public interface
            cost = _Cost()
            factor, stars = cost.of(tree)
            if cost.ranges > MAX_IN_RANGES:
                return f"has ranges of more than {MAX_IN_RANGES} characters"
            if cost.empty or factor * math.comb(NAME_LENGTH + stars, stars) > MAX_WAYS:
                return (
                    "could take very long to match a name: use at most three of '.*' and the like, '[^.]*' for what "
                    "ends in a dot, and no repetition of repetitions such as '(a+)+', or list the names"
                )
            re.compile(pattern)
    except (re.error, ValueError, OverflowError, RecursionError, Warning) as error:
        return f"does not compile: {error}"
    return None


class _Cost:
    """Bounds the number of ways in which a parse tree can match a name.

    Attributes:
        ranges: characters in the ranges seen so far.
        empty: whether something that may be empty is repeated.
    """

    def __init__(self) -> None:
        self.ranges = 0
        self.empty = False

    def of(self, items: Sequence[tuple[Any, Any]]) -> tuple[int, int]:
        """A factor, and the number of repetitions that share the length of the name among them."""
        factor, stars = 1, 0
        for place, (code, value) in enumerate(items):
            following = items[place + 1] if place + 1 < len(items) else (None, None)
            f, s = self._of_item(str(code), value, following)
            factor, stars = min(factor * f, 2 * MAX_WAYS), stars + s
        return factor, stars

    def _of_item(self, code: str, value: Any, following: tuple[Any, Any]) -> tuple[int, int]:
        if code.endswith("_REPEAT"):
            lowest, highest, body = value
            return self._of_repeat(lowest, highest, body, following)
        if code == "IN":
            self.ranges += sum(high - low for kind, bounds in value if str(kind) == "RANGE" for low, high in [bounds])
        elif code == "BRANCH":
            costs = [self.of(branch) for branch in value[1]]
            starts = {branch[0] for branch in value[1] if len(branch) and str(branch[0][0]) == "LITERAL"}
            factors = [f for f, _ in costs]
            # Branches that begin with different letters exclude each other.
            factor = max(factors) if len(starts) == len(costs) else sum(factors)
            return factor, max(s for _, s in costs)
        elif code == "GROUPREF_EXISTS":
            costs = [self.of(branch) for branch in value[1:] if branch is not None]
            return sum(f for f, _ in costs), max(s for _, s in costs)
        elif code == "SUBPATTERN":
            return self.of(value[-1])
        elif code in ("ASSERT", "ASSERT_NOT"):
            return self.of(value[1])
        elif code == "ATOMIC_GROUP":
            return self.of(value)
        return 1, 0

    def _of_repeat(self, lowest: int, highest: int, body: Any, following: tuple[Any, Any]) -> tuple[int, int]:
        factor, stars = self.of(body)
        self.empty = self.empty or (highest > 1 and body.getwidth()[0] == 0)
        times = min(highest, 20)  # a factor of 2 to the power of 20 is too much already
        factor, stars = min(factor**times, 2 * MAX_WAYS), stars * times
        if _ends_at(body, following):
            return factor, stars
        choices = highest - lowest + 1
        return (factor * choices, stars) if choices <= 20 else (factor, stars + 1)


def _ends_at(body: Any, following: tuple[Any, Any]) -> bool:
    """Whether a repeated character cannot be the literal that follows, as in ``[^.]*[.]``: one way to match."""
    if len(body) != 1 or str(following[0]) != "LITERAL":
        return False
    code, value = body[0]
    if str(code) in ("LITERAL", "NOT_LITERAL"):
        return bool((value == following[1]) == (str(code) == "NOT_LITERAL"))
    if str(code) != "IN":
        return False
    character = chr(following[1])
    kinds = [str(kind) for kind, _ in value]
    found = any(_holds(str(kind), of, character) for kind, of in value if str(kind) != "NEGATE")
    return found == ("NEGATE" in kinds)


def _holds(kind: str, value: Any, character: str) -> bool:
    if kind == "LITERAL":
        return bool(value == ord(character))
    if kind == "RANGE":
        return bool(value[0] <= ord(character) <= value[1])
    tests: dict[str, bool] = {
        "CATEGORY_DIGIT": character.isdecimal(),
        "CATEGORY_SPACE": character.isspace(),
        "CATEGORY_WORD": character.isalnum() or character == "_",
    }
    name = str(value)
    return tests[name] if name in tests else not tests[name.replace("_NOT_", "_")]


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
        "refresh": _or_none(_integer(0, "None or ")),
        "coefficient_steps": _or_none(_integer(1, "None or ")),
        "step_scale": _choice(STEP_SCALES),
        "update": _choice(UPDATES),
        "fallback": _choice(FALLBACKS),
        "fallback_lr": _or_none(_real("None (that is, lr) or a finite number >= 0", lambda x: x >= 0)),
        "beta2": _real("a number >= 0 and < 1", lambda x: 0 <= x < 1),
        "eps": _real("a finite number > 0", lambda x: x > 0),
        "memory_budget": _integer(1),
        "target_modules": _modules(_LINEAR_OR_NAMES, fewest=1),
        "exclude_modules": _or_none(_modules("None, a regular expression or a list of module names", fewest=0)),
        "weigh_rest": _flag,
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
                f"FNGD has no argument {_shown(key)}, it has {', '.join(ARGUMENTS)}{guess(key, ARGUMENTS)}"
            )
        checks[key](key, value)
