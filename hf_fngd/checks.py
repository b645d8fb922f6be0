"""Checks of an argument's value: each returns it in the form that a JSON file gives back, or raises.

A check takes the argument's name and its value. It raises TypeError where the value has the wrong type, and ValueError
where it is out of range; the message names the argument, the value and what is accepted.
"""

from __future__ import annotations

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
    """Name what a misspelt name was probably meant to be; empty where nothing comes close."""
    close = difflib.get_close_matches(name[:100], names, n=3, cutoff=0.6) if isinstance(name, str) else []
    return text.format(" or ".join(map(repr, close))) if close else ""


def wrong_type(key: str, value: object, accepted: str) -> TypeError:
    """The error for a value of the wrong type."""
    return TypeError(f"{key} must be {accepted}, got {shown(value)} of type {type(value).__name__}")


def wrong_value(key: str, value: object, accepted: str) -> ValueError:
    """The error for a value out of range."""
    return ValueError(f"{key} must be {accepted}, got {shown(value)}")


def real(accepted: str, holds: Callable[[float], bool]) -> Check:
    """A real number for which a condition holds; never nan, an infinity or a bool."""

    def check(key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise wrong_type(key, value, accepted)
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or not holds(number):
            raise wrong_value(key, value, accepted)
        return number

    return check


def integer(lowest: int) -> Check:
    """An integer, not below the lowest and within an int64."""
    accepted = f"an integer from {lowest} to {MAX_INTEGER}"

    def check(key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise wrong_type(key, value, accepted)
        if not lowest <= int(value) <= MAX_INTEGER:
            raise wrong_value(key, value, accepted)
        return int(value)

    return check


def choice(names: Callable[[], Collection[str]]) -> Check:
    """One of some names, which are asked for when the check runs, as names are registered later."""

    def check(key: str, value: Any) -> str:
        accepted = "one of " + ", ".join(map(repr, names()))
        if not isinstance(value, str):
            raise wrong_type(key, value, accepted)
        if value not in names():
            raise ValueError(f"{key} must be {accepted}, got {shown(value)}{guess(value, names())}")
        return value

    return check


def flag(key: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise wrong_type(key, value, "True or False")
    return value


def _text(key: str, value: Any, accepted: str) -> str:
    if not isinstance(value, str):
        raise wrong_type(key, value, accepted)
    if not 0 < len(value) <= MAX_CHARACTERS:
        raise wrong_value(key, value, f"{accepted}, of 1 to {MAX_CHARACTERS} characters")
    return value


def modules(accepted: str, fewest: int) -> Check:
    """A regular expression, or a list of at least ``fewest`` module names."""

    def check(key: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            if not fewest <= len(value) <= MAX_NAMES:
                raise ValueError(f"{key} must hold {fewest} to {MAX_NAMES} module names, got {len(value)}")
            return [_text(f"{key}[{index}]", name, "a module's name") for index, name in enumerate(value)]
        try:
            counts = [
                re.findall(r"[0-9]+", braces) for braces in re.findall(r"\{[0-9, ]+\}", _text(key, value, accepted))
            ]
            if len(value) * math.prod(max(1, *map(int, of)) for of in counts if of) > MAX_UNROLLED:
                raise ValueError("it repeats its parts too often")
            regex.compile(value)
        except (regex.error, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{key} must be {accepted}, got {shown(value)}; this regular expression does not compile: {error}"
            ) from error
        return value

    return check
