"""Every argument, with values that are accepted and values that are refused."""

import math
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_fngd.arguments import (
    ARGUMENTS,
    FALLBACKS,
    MAX_CHARACTERS,
    MAX_INTEGER,
    MAX_NAMES,
    REALS,
    SHARING,
    STEP_SCALES,
    UPDATES,
    validate,
)

NOT_A_REAL = [True, "0.1", [0.1], 1j, b"1"]
NOT_AN_INTEGER = [True, 1.0, "1", None, [1]]
NOT_A_NAME = [None, 0, True, ["rms"], b"rms"]
NOT_MODULES = [0, True, {"fc1": 1}, {"fc1"}, b"fc1", ["fc1", 2], [None], ("fc1", ["fc2"])]
NOT_FINITE = [math.nan, math.inf, -math.inf, 10**400]
BAD_PATTERNS = ["(", "*fc", "[a-", "fc(?P<x", "a{99999999999999}", "(" * 5000 + ")" * 5000]
# Patterns that Python needs very long to match or to compile.
SLOW_PATTERNS = [
    r"(a+)+b",
    r"(a*)*",
    r"(a|aa)+b",
    r"(?:a|b|ab)*c",
    r"([a-z]+\.?)*x",
    r"(\w+\s?)*\.",
    r"(.*a){11}",
    r"(?:a?){60}a{60}",
    r"((a{0,50}){0,50}){0,50}x",
    r"(?:^){1000000}x",
    r"(?=(a+)+b)a",
    r"(?>(a+)+)b",
    r"(?P<n>a*)(?:(?P=n)a*)+b",
    "a?" * 40 + "a" * 40,
    ".*" * 4 + "x",
    r"[^.]*.*\d+.*\w+",
    "(?i)" + "[\0-\U0010ffff]" * 20,
    "[\u0100-\uffff]" * 20,
]
SWIFT_PATTERNS = [
    r".*\.fc[12]",
    r"(?:encoder|decoder)\..*",
    r".*\.layers\.\d+\..*attn.*\.(q|k|v)_proj",
    r"model\.layers\.(?:[0-9]|1[01])\.mlp\.(?:up|down|gate)_proj",
    r"^.*\.(attention|attn|self_attn|self)\..*(q|k|v)\w*$",
    r"(.*\.)?(q_proj|query|k_proj|key|v_proj|value)",
    r"h\.[0-9]{1,2}\.(attn|mlp)\.c_(attn|proj|fc)",
    r"(?!.*lm_head).*",
    r"(?i).*LORA.*",
    r"(?:[^.]+\.)*fc1",
    r"(?:[a-z_]+\.){2}\d+\..+",
    r"(?:\W*\w)(?:[^\W]+\.)?(?:[.\d]+\D)\S+\s",
    r"(a)?(?(1)b|c)",
]
BAD_MODULES = [
    "",
    *SLOW_PATTERNS,
    *BAD_PATTERNS,
    "a" * (MAX_CHARACTERS + 1),
    [""],
    ["a"] * (MAX_NAMES + 1),
    ["a" * 20_000],
]

GOOD = {
    "lr": [0, 0.0, 1, 1e-3, 1e300],
    "momentum": [0, 0.0, 0.9, 0.999999],
    "damping": [1e-12, 0.003, 1, 1e6],
    "weight_decay": [0, 0.0, 0.1],
    "sharing": SHARING,
    "refresh": [None, 0, 1, 10, MAX_INTEGER],
    "coefficient_steps": [None, 1, 1000],
    "step_scale": STEP_SCALES,
    "update": UPDATES,
    "fallback": FALLBACKS,
    "fallback_lr": [None, 0, 1e-4],
    "beta2": [0, 0.999],
    "eps": [1e-300, 1e-8],
    "memory_budget": [1, 2**28],
    "target_modules": ["all-linear", *SWIFT_PATTERNS, ["fc1"], ("decoder.fc1", "fc2")],
    "exclude_modules": [None, "lm_head", [], ["lm_head"]],
    "weigh_rest": [True, False],
    "strict": [True, False],
}
WRONG_TYPES = {
    "lr": [None, *NOT_A_REAL],
    "momentum": [None, *NOT_A_REAL],
    "damping": [None, *NOT_A_REAL],
    "weight_decay": [None, *NOT_A_REAL],
    "sharing": NOT_A_NAME,
    "refresh": [True, 1.0, "1", [1]],
    "coefficient_steps": [True, 1.0, "1", [1]],
    "step_scale": NOT_A_NAME,
    "update": NOT_A_NAME,
    "fallback": NOT_A_NAME,
    "fallback_lr": NOT_A_REAL,
    "beta2": [None, *NOT_A_REAL],
    "eps": [None, *NOT_A_REAL],
    "memory_budget": NOT_AN_INTEGER,
    "target_modules": [None, *NOT_MODULES],
    "exclude_modules": NOT_MODULES,
    "weigh_rest": [None, 0, 1, "true"],
    "strict": [None, 0, 1, "true"],
}
WRONG_VALUES = {
    "lr": [-1e-9, -1, *NOT_FINITE],
    "momentum": [-0.1, 1, 1.0, 2, *NOT_FINITE],
    "damping": [0, 0.0, -1, *NOT_FINITE],
    "weight_decay": [-0.1, *NOT_FINITE],
    "sharing": ["", "rank", "Ranked", "ranked "],
    "refresh": [-1, MAX_INTEGER + 1, 10**5000],
    "coefficient_steps": [0, -1, MAX_INTEGER + 1],
    "step_scale": ["", "RMS", "fisher"],
    "update": ["", "sgd", "adamw"],
    "fallback": ["", "adam", "muon"],
    "fallback_lr": [-1, *NOT_FINITE],
    "beta2": [-0.1, 1, *NOT_FINITE],
    "eps": [0, -1e-8, *NOT_FINITE],
    "memory_budget": [0, -1, MAX_INTEGER + 1],
    "target_modules": [[], (), *BAD_MODULES],
    "exclude_modules": BAD_MODULES,
    # Both values of a bool are right: weigh_rest and strict have no wrong ones.
}


def rows(table):
    return [pytest.param(key, value, id=f"{key}-{i}") for key in table for i, value in enumerate(table[key])]


def test_the_tables_cover_every_argument():
    assert tuple(GOOD) == tuple(WRONG_TYPES) == (*WRONG_VALUES, "weigh_rest", "strict") == ARGUMENTS


@pytest.mark.parametrize(("key", "value"), rows(GOOD))
def test_accepts(key, value):
    validate({key: value})


@pytest.mark.parametrize(("key", "value"), rows(WRONG_TYPES))
def test_a_wrong_type_is_refused_by_name(key, value):
    with pytest.raises(TypeError, match=rf"^{key}(\[\d\])? must be .*, got .* of type ") as caught:
        validate({key: value})
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(("key", "value"), rows(WRONG_VALUES))
def test_a_wrong_value_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=rf"^{key}(\[\d\])? must .*, got ") as caught:
        validate({key: value})
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("key", REALS)
def test_a_real_may_be_an_int(key):
    validate({key: 1 if key in ("damping", "eps") else 0})


def test_a_message_shows_the_value_and_what_is_accepted():
    with pytest.raises(ValueError, match=re.escape("momentum must be a number >= 0 and < 1, got 1.5")):
        validate({"momentum": 1.5})
    with pytest.raises(ValueError, match="one of 'rms', 'ngd', got 'rsm'; did you mean 'rms'"):
        validate({"step_scale": "rsm"})


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
def test_a_broken_regular_expression_is_explained(key):
    with pytest.raises(ValueError, match=rf"^{key} .*does not compile: missing \), unterminated subpattern"):
        validate({key: r"decoder\.(fc1"})


@pytest.mark.parametrize("pattern", SLOW_PATTERNS)
def test_a_slow_regular_expression_is_explained(pattern):
    with pytest.raises(ValueError, match=r"this regular expression (could take very long to match|has ranges of more)"):
        validate({"target_modules": pattern})


def test_an_ambiguous_regular_expression_is_refused():
    with pytest.raises(ValueError, match="does not compile: Possible nested set at position 1"):
        validate({"target_modules": "[[a]"})


pieces = st.sampled_from(["a", "b", ".", "[ab]", "[^b]", "[a-z]", r"\w", r"\d", r"\W", r"\."])
repetitions = st.sampled_from(["", "", "*", "+", "?", "{2}", "{0,30}", "{3,}", "*?", "??"])
patterns = st.recursive(
    st.tuples(pieces, repetitions).map("".join),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.tuples(st.lists(inner, min_size=1, max_size=3).map("|".join), repetitions).map("(?:{0[0]}){0[1]}".format),
        inner.map("(?=({}))".format),
    ),
    max_leaves=8,
)


@given(patterns)
def test_whatever_is_accepted_matches_fast(pattern):
    """Names in which everything looks alike, and which fail at their end."""
    try:
        validate({"target_modules": pattern})
    except ValueError:
        return
    start = time.process_time()
    for name in ("a" * 99 + "!", "ab" * 50 + "!", "aaaa.ab." * 12 + "!"):
        re.fullmatch(pattern, name)
    assert time.process_time() - start < 1  # an accepted one needs milliseconds, a slow one years


def test_an_unknown_argument_is_refused_with_a_guess():
    with pytest.raises(ValueError, match=r"no argument 'dampning'.*did you mean 'damping'"):
        validate({"dampning": 0.1})
    with pytest.raises(ValueError, match=r"no argument 'x', it has lr, momentum, .*strict$"):
        validate({"x": 0.1})


def test_a_value_that_python_will_not_write_is_refused_all_the_same():
    with pytest.raises(TypeError, match=r"^target_modules must be .*an integer of \d+ bits"):
        validate({"target_modules": {"fc1": 10**5000}})


def test_choices_may_come_from_a_registry():
    registered = {"sharing": [*SHARING, "mine"]}
    validate({"sharing": "mine", "update": "adam"}, choices=registered)
    with pytest.raises(ValueError, match=r"sharing must be one of .*'mine', got 'min'; did you mean 'mine'"):
        validate({"sharing": "min"}, choices=registered)
    with pytest.raises(ValueError, match="sharing must be one of"):
        validate({"sharing": "mine"})


def test_nothing_to_check_is_fine():
    validate({})
