"""Checks of an argument's value: each returns it in the form that a JSON file gives back, or raises.

A check takes the argument's name and its value. TypeError says that the type is wrong, ValueError that the value is out
of range. The message names the argument, the value and what is accepted.
"""

import difflib
import math
import numbers
import re
import reprlib
from collections.abc import Callable, Collection
from typing import Any

import regex

# Counters and sizes end up in int64 tensors and checkpoints.
MAX_INTEGER = 2**63 - 1
# A config may come from anyone: these are far above any model's needs and keep a hostile one cheap to refuse.
MAX_CHARACTERS = 10_000
MAX_NAMES = 10_000
# Repetitions are unrolled when a pattern is compiled: beyond this, in characters, that takes seconds and gigabytes.
MAX_UNROLLED = 10**6

Check = Callable[[str, Any], Any]


class Misplaced:
    """An optimizer's attribute on a class that a user may pass in an optimizer's place: AttributeError with the cure.

    Instances may have the attribute all the same.
    """

    def __init__(self, cure: str) -> None:
        self._cure = cure

    def __get__(self, instance: object, owner: type) -> Any:
        raise AttributeError(self._cure)


def shown(value: object) -> str:
    """A value for an error message, cut to a readable length."""
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        return f"<an integer of {value.bit_length()} bits>"  # Python refuses to write the very long ones
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    try:
        return short.repr(value)
    except ValueError:  # such an integer within it
        return f"<a {type(value).__name__}>"


def guess(name: object, names: Collection[str], text: str = "; did you mean {}?") -> str:
    """Name what a misspelt name was probably meant to be; empty if nothing comes close."""
    close = difflib.get_close_matches(name[:100], names, n=3, cutoff=0.6) if isinstance(name, str) else []
    return text.format(" or ".join(map(repr, close))) if close else ""


def wrong_type(key: str, value: object, accepted: str) -> TypeError:
    """The error for a value of the wrong type."""
    return TypeError(f"{key} must be {accepted}, got {shown(value)} of type {type(value).__name__}")


def _number(kind: type, convert: Callable[[Any], Any], accepted: str, holds: Callable[[Any], bool]) -> Check:
    def check(key: str, value: Any) -> Any:
        if getattr(value, "ndim", None) == 0:  # of torch or numpy
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, kind):
            raise wrong_type(key, value, accepted)
        try:
            number = convert(value)
        except OverflowError:
            number = math.inf
        if not (abs(number) < math.inf and holds(number)):  # nan is not below infinity either
            raise ValueError(f"{key} must be {accepted}, got {shown(value)}")
        return number

    return check


def real(accepted: str, holds: Callable[[float], bool]) -> Check:
    """A finite real number for which a condition holds."""
    return _number(numbers.Real, float, accepted, holds)


NOT_NEGATIVE = real("a finite number >= 0", lambda x: x >= 0)


def integer(lowest: int, highest: int = MAX_INTEGER) -> Check:
    """An integer, not below the lowest, not above the highest and within an int64."""
    accepted = f"an integer from {lowest} to {highest}"
    return _number(numbers.Integral, int, accepted, lambda number: lowest <= number <= highest)


def choice(names: Collection[str]) -> Check:
    """One of some names, to which others may be added later."""

    def check(key: str, value: Any) -> str:
        accepted = "one of " + ", ".join(map(repr, names))
        if not isinstance(value, str):
            raise wrong_type(key, value, accepted)
        if value not in names:
            raise ValueError(f"{key} must be {accepted}, got {shown(value)}{guess(value, names)}")
        return value

    return check


def flag(key: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise wrong_type(key, value, "True or False")
    return value


def text(key: str, value: Any, accepted: str) -> str:
    """A string that is neither empty nor very long."""
    if not isinstance(value, str):
        raise wrong_type(key, value, accepted)
    if not 0 < len(value) <= MAX_CHARACTERS:
        raise ValueError(f"{key} must be {accepted}, of 1 to {MAX_CHARACTERS} characters, got {shown(value)}")
    return value


def modules(accepted: str, fewest: int) -> Check:
    """A regular expression, or a list of at least ``fewest`` module names."""

    def check(key: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            if not fewest <= len(value) <= MAX_NAMES:
                raise ValueError(f"{key} must hold {fewest} to {MAX_NAMES} module names, got {len(value)}")
            return [text(f"{key}[{index}]", name, "a module's name") for index, name in enumerate(value)]
        text(key, value, accepted)
        try:
            braces = re.findall(r"\{[0-9, ]+\}", value)
            repeats = (max([1, *map(int, re.findall(r"[0-9]+", counts))]) for counts in braces)
            if len(value) * math.prod(repeats) > MAX_UNROLLED:
                raise ValueError("it repeats its parts too often")
            regex.compile(value)
        except (regex.error, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{key} must be {accepted}, got {shown(value)}; this regular expression does not compile: {error}"
            ) from error
        return value

    return check
