"""Every argument, with values that are accepted, values that are refused, and values that nothing reads."""

import dataclasses
import inspect
import math
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_fngd import FNGD, FNGDConfig, FNGDPreconditioner, policy_names
from hf_fngd.checks import MAX_CHARACTERS, MAX_INTEGER, MAX_NAMES
from hf_fngd.layers.base import layer_type_names
from hf_fngd.settings import Settings, setting_names
from hf_fngd.updates import FALLBACK_RULES, RULES
from hf_fngd.updates.base import UpdateRule
from hf_fngd.weights.base import _POLICIES, SharingPolicy, policy_class, register_policy
from tests.nets import UPDATES, Net, net
from tests.refusals import refusal

NOT_A_REAL = [True, "0.1", [0.1], 1j, b"1"]
NOT_AN_INTEGER = [True, 1.0, "1", [1]]
NOT_A_NAME = [None, 0, True, ["muon"], b"muon"]
NOT_MODULES = [0, True, {"fc1": 1}, {"fc1"}, b"fc1", ["fc1", 2], [None], ("fc1", ["fc2"])]
NOT_FINITE = [math.nan, math.inf, -math.inf, 10**400]
BAD_PATTERNS = ["(", "*fc", "(?P<x", r"\1", "(?P<a>a)(?P<a>b", "(" * 5000 + ")" * 5000]
# Whose compilation would take gigabytes.
BAD_PATTERNS += ["a{99999999}", "(?:^){ 100000000 }a", "((?:^){9999}){9999}b", "a{" + "9" * 5000 + "}"]
PATTERNS = [
    r".*\.fc[12]",
    r".*\.layers\.\d+\..*attn.*\.(q|k|v)_proj",
    r"(.*\.)?(q_proj|query|k_proj|key|v_proj|value)",
    r"(?!.*lm_head).*",
    r"(?i).*LORA.*",
    r"h\.[0-9]{1,2}\.(?:[a-z_]+\.){0,5}\w{2,}",
    r"(a+)+b",  # matched with a time limit
]
BAD_MODULES = ["", *BAD_PATTERNS, "a" * (MAX_CHARACTERS + 1), [""], ["a"] * (MAX_NAMES + 1), ["a" * 20_000]]

GOOD: dict[str, list[Any]] = {
    "lr": [None, 0, 0.0, 1, 1e-3, 1e300, numpy.float32(0.5), torch.tensor(0.5), numpy.array(0.5)],
    "momentum": [0, 0.0, 0.9, 0.999999],
    "weight_decay": [0, 0.0, 0.1],
    "sharing": list(policy_names()),
    "damping": [None, 1e-12, 0.003, 1, 1e6],
    "coefficient_steps": [None, 1, 1000, MAX_INTEGER, numpy.int64(3)],
    "update": list(UPDATES),
    "block_size": [None, 1, 64, numpy.int64(8)],
    "ns_steps": [None, 1, 5, 100],
    "fallback": list(FALLBACK_RULES),
    "fallback_lr": [None, 0, 1e-4],
    "beta2": [None, 0, 0.999],
    "eps": [None, 1e-300, 1e-8],
    "param_groups": [
        None,
        [{"params": ["fc2"], "lr": 0.1}],
        [{"params": r"fc1\..*", "weight_decay": 0.1, "update": "adam"}, {"params": ["norm", "fc2.bias"]}],
    ],
    "memory_budget": [None, 1, 2**28],
    "target_modules": ["all-linear", *PATTERNS, ["fc1"], ("decoder.fc1", "fc2")],
    "exclude_modules": [None, "lm_head", [], ["lm_head"]],
    "layer_types": [None, ["linear"], ("linear", "norm"), list(layer_type_names())],
    "strict": [True, False],
    "batch_dim": [None, 0, 1, numpy.int64(1)],
}
WRONG_TYPES: dict[str, list[Any]] = {
    "lr": NOT_A_REAL,
    "momentum": [None, *NOT_A_REAL],
    "weight_decay": [None, *NOT_A_REAL],
    "sharing": [*NOT_A_NAME, SharingPolicy],
    "damping": NOT_A_REAL,
    "coefficient_steps": NOT_AN_INTEGER,
    "update": NOT_A_NAME,
    "block_size": NOT_AN_INTEGER,
    "ns_steps": NOT_AN_INTEGER,
    "fallback": NOT_A_NAME,
    "fallback_lr": NOT_A_REAL,
    "beta2": NOT_A_REAL,
    "eps": NOT_A_REAL,
    "param_groups": [0, True, "fc1", {"params": ["fc1"]}, ["fc1"], [{}], [{"lr": 1}], [{"params": "a", "rate": 1}]],
    "memory_budget": NOT_AN_INTEGER,
    "target_modules": [None, *NOT_MODULES],
    "exclude_modules": NOT_MODULES,
    "layer_types": ["linear", [], {}, [1], ["linear", None]],
    "strict": [None, 0, 1, "true"],
    "batch_dim": NOT_AN_INTEGER,
}
WRONG_VALUES: dict[str, list[Any]] = {
    "lr": [-1e-9, -1, *NOT_FINITE],
    "momentum": [-0.1, 1, 1.0, 2, *NOT_FINITE],
    "weight_decay": [-0.1, *NOT_FINITE],
    "sharing": ["", "clip", "Clipped", "clipped ", "ranked"],
    "damping": [0, 0.0, -1, *NOT_FINITE],
    "coefficient_steps": [0, -1, MAX_INTEGER + 1, 10**5000],
    "update": ["", "sgd", "adamw"],
    "block_size": [0, -1, MAX_INTEGER + 1],
    "ns_steps": [0, -1, 101],
    "fallback": ["", "adam", "muon"],
    "fallback_lr": [-1, *NOT_FINITE],
    "beta2": [-0.1, 1, *NOT_FINITE],
    "eps": [0, -1e-8, *NOT_FINITE],
    "param_groups": [[], ()],
    "memory_budget": [0, -1, MAX_INTEGER + 1],
    "target_modules": [[], (), *BAD_MODULES],
    "exclude_modules": BAD_MODULES,
    "layer_types": [["Linear"], ["linear", "tables"]],
    "strict": [],  # both values of a bool are right
    "batch_dim": [-1, 2, 10**5000],
}
# Under which every argument is read.
READ = {"sharing": "replay", "update": "block_muon"}
NESTED: Any = math.nan
for _ in range(40):
    NESTED = [{"a": NESTED}]
# Of the wrong type for any argument.
ODD = [{}, NESTED, [NESTED, 10**5000], 1j, bytearray(10**6), {1, 2}, object(), print, torch.zeros(10**6), Path("/etc")]
ODD += [range(10**30), iter(()), {"a": 10**5000}]


def rows(table: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(key, value, id=f"{key}-{i}") for key in table for i, value in enumerate(table[key])]


def fngd(**values: Any) -> FNGD:
    return FNGD(net(), **values)


OWNERS = (Settings, FNGDConfig, lambda **values: FNGDConfig.from_dict(values), fngd)


def refused(error: type[Exception], match: str, owners: Any = OWNERS, **values: Any) -> None:
    """All of them refuse it in the same words, and in the bounds of a refusal."""
    found = [refusal(lambda make=make: make(**values), longest=600) for make in owners]
    assert {(type(raised), str(raised)) for raised in found} == {(error, str(found[0]))}
    assert re.search(match, str(found[0]))


# One by one ------------------------------------------------------------------------------------------------


def test_the_tables_cover_every_argument() -> None:
    assert tuple(GOOD) == tuple(WRONG_TYPES) == tuple(WRONG_VALUES) == setting_names()


@pytest.mark.parametrize(("key", "value"), rows(GOOD))
def test_a_good_value_is_kept_as_json_gives_it_back(key: str, value: Any) -> None:
    for make in OWNERS[:3]:
        found = getattr(make(**READ | {key: value}), key)
        assert found == (list(value) if isinstance(value, tuple) else value)
        assert type(found) in (type(None), str, bool, int, float, list)
        assert type(found) is not int or key in (
            "coefficient_steps",
            "block_size",
            "ns_steps",
            "memory_budget",
            "batch_dim",
        )
        assert found is not value or not isinstance(value, list)


@pytest.mark.parametrize(("key", "value"), rows({key: [*WRONG_TYPES[key], *ODD] for key in WRONG_TYPES}))
def test_a_wrong_type_is_refused_by_name(key: str, value: Any) -> None:
    refused(TypeError, rf"^{key}(\[\d\])? must be .*, got .* of type ", **READ | {key: value})


@pytest.mark.parametrize(("key", "value"), rows(WRONG_VALUES))
def test_a_wrong_value_is_refused_by_name(key: str, value: Any) -> None:
    refused(ValueError, rf"^{key}(\[\d\])? must .*, got ", **READ | {key: value})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["muon", "never", "linear"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(setting_names()), json_values))
def test_whatever_a_file_holds_is_taken_or_refused_by_name(values: dict[str, Any]) -> None:
    error = None
    try:
        FNGDConfig.from_dict(values)
    except (TypeError, ValueError) as raised:
        error = str(raised)
    assert error is None or (any(error.startswith(key) for key in values) and len(error) <= 600)


def test_a_message_shows_the_value_and_what_is_accepted() -> None:
    with pytest.raises(ValueError, match=re.escape("momentum must be a number >= 0 and < 1, got 1.5")):
        Settings(momentum=1.5)
    with pytest.raises(ValueError, match=r"one of 'adam', .*'muon'.*, got 'mouon'; did you mean 'muon'"):
        Settings(update="mouon")
    with pytest.raises(ValueError, match=r"^target_modules .*does not compile: missing \)"):
        Settings(target_modules=r"decoder\.(fc1")
    with pytest.raises(TypeError, match=r"^target_modules must be .*, got .* of type dict$"):
        Settings(target_modules={"fc1": 10**5000})  # which Python refuses to write
    with pytest.raises(ValueError, match=r"^coefficient_steps must be .*an integer of \d+ bits"):
        Settings(coefficient_steps=10**5000, sharing="replay")


@pytest.mark.parametrize("attach", [FNGD, FNGDPreconditioner])
def test_a_wrong_argument_leaves_the_model_alone(attach: Any) -> None:
    for arguments in ({"damping": 0, "sharing": "never"}, {"target_modules": ["fc3"]}, {"damping": 0.1}, {"x": 1}):
        model = net()
        with pytest.raises((TypeError, ValueError)):
            attach(model, **arguments)
        assert type(model) is Net
        assert type(model.fc1) is torch.nn.Linear


# Together --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", policy_names())
@pytest.mark.parametrize(("key", "value"), [("damping", 0.1), ("coefficient_steps", 3), ("memory_budget", 2**20)])
def test_what_the_policy_does_not_read_is_refused_by_naming_who_does(sharing: str, key: str, value: Any) -> None:
    readers = policy_names(lambda policy: key in policy.reads)
    if sharing in readers:
        for make in OWNERS:
            make(sharing=sharing, **{key: value})
        return
    named = " or ".join(map(repr, readers))
    refused(ValueError, f"^{key}={value} has no effect .*use sharing={named}", sharing=sharing, **{key: value})


@pytest.mark.parametrize("key", ["beta2", "eps"])
def test_what_neither_rule_reads_is_refused(key: str) -> None:
    rules = {"sharing": "never", "update": "momentum", "fallback": "sgd"}
    refused(ValueError, rf"^{key}=0\.5 has no effect .*use update='adam' or fallback='adamw'", **rules, **{key: 0.5})
    for change in ({"update": "muon"}, {"fallback": "adamw"}):  # muon leaves the biases to adam
        Settings(**rules | change | {key: 0.5})


def test_what_a_rule_of_ones_own_does_not_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "sign", UpdateRule(lambda update: None, (), (), matrices=False, over_adamw=1.0))
    for key in ("beta2", "eps"):
        refused(ValueError, rf"^{key}=0\.5 has no effect .*'sgd'", update="sign", fallback="sgd", **{key: 0.5})
        Settings(update="sign", **{key: 0.5})
    refused(ValueError, "^ns_steps=3 has no effect with update='sign'", update="sign", ns_steps=3)


def test_the_size_of_blocks_is_refused_where_none_are_made() -> None:
    message = "^block_size=8 has no effect with update='muon': .*use update='block_muon'"
    refused(ValueError, message, update="muon", block_size=8)
    groups = fngd(update="muon", block_size=8, param_groups=[{"params": ["fc2"], "update": "block_muon"}]).param_groups
    assert [group.get("block_size") for group in groups if group["rule"] == "block_muon"] == [8]
    assert fngd().param_groups[0]["block_size"] is None


def test_newton_schulz_steps_are_refused_where_none_are_taken() -> None:
    refused(
        ValueError,
        "^ns_steps=3 has no effect with update='adam': .*use update='block_muon' or 'muon'",
        update="adam",
        ns_steps=3,
    )
    groups = fngd(update="adam", ns_steps=3, param_groups=[{"params": ["fc2"], "update": "muon"}]).param_groups
    assert [group.get("ns_steps") for group in groups if group["rule"] == "muon"] == [3]


@pytest.mark.parametrize("sharing", policy_names())
def test_the_papers_step_needs_a_policy_that_measures_it(sharing: str) -> None:
    if policy_class(sharing).solves:
        assert fngd(sharing=sharing, update="momentum").param_groups[0]["rule"] == "momentum"
    else:
        refused(ValueError, "update='momentum' steps by .*use update='block_muon'", sharing=sharing, update="momentum")


@pytest.mark.parametrize(("owner", "engine"), [(FNGD, False), (FNGDPreconditioner, True)])
def test_an_unknown_argument_is_a_type_error_with_a_guess(owner: Any, engine: bool) -> None:
    with pytest.raises(TypeError, match=rf"{owner.__name__} has no argument 'dampning', it .*did you mean 'damping'"):
        owner(net(), dampning=0.1)
    with pytest.raises(TypeError, match=rf"no argument 'x', it has {', '.join(setting_names(engine))}$"):
        owner(net(), x=0.1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'x'"):
        FNGDConfig(x=0.1)


def test_unset_arguments_mean_what_their_help_says() -> None:
    for name in ("damping", "ns_steps", "beta2", "eps", "memory_budget"):
        value = Settings().effective(name)
        shown = {2**28: "2**28", 1e-8: "1e-8"}.get(value, str(value))
        assert f"None: {shown}." in Settings.__dataclass_fields__[name].metadata["help"]
    assert fngd().defaults == {"lr": 1e-3, "momentum": 0.9, "beta2": 0.999, "eps": 1e-8}
    assert FNGDPreconditioner(net(), sharing="never").policy.damping == 0.1


# One source ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("owner", "engine"), [(FNGD, False), (FNGDPreconditioner, True)])
def test_signatures_and_docstrings_derive_from_the_settings(owner: Any, engine: bool) -> None:
    _, _, *parameters = inspect.signature(owner.__init__).parameters.values()
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    assert {p.name: p.default for p in parameters} == {name: defaults[name] for name in setting_names(engine)}
    for name in setting_names(engine):
        assert f"\n    {name}: " in owner.__doc__
    assert max(map(len, owner.__doc__.splitlines())) <= 120


def test_every_argument_has_help() -> None:
    assert all(field.metadata["help"].endswith(".") for field in dataclasses.fields(Settings))
    for name in (*policy_names(), *UPDATES, *FALLBACK_RULES, *layer_type_names()):
        assert sum(f"'{name}'" in field.metadata["help"] for field in dataclasses.fields(Settings)) >= 1, name


def test_settings_cannot_be_changed() -> None:
    for settings in (Settings(), FNGDConfig(), fngd().settings):
        with pytest.raises(dataclasses.FrozenInstanceError):
            settings.lr = -1.0
    listed = ["fc1"]
    settings = Settings(target_modules=listed)
    listed.append("fc2")
    assert settings.target_modules == ["fc1"]


def test_a_policy_of_ones_own_is_a_value_like_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_fngd.weights.base._POLICIES", dict(_POLICIES))
    mine = type("Mine", (policy_class("uniform"),), {"name": "mine", "reads": ("damping",)})
    refused(ValueError, "sharing must be one of .*got 'mine'", sharing="mine")
    policy = mine()
    assert FNGD(net(), sharing=policy, damping=0.2).preconditioner.policy is policy
    with pytest.raises(TypeError, match="sharing must be a policy's name in a config, got a Mine"):
        FNGDConfig(sharing=policy)
    register_policy(mine)
    assert FNGDConfig.from_dict(FNGDConfig(sharing="mine").to_dict()).sharing == "mine"
    refused(ValueError, "use sharing='mine' or 'never' or 'replay'", OWNERS[:1], sharing="clipped", damping=0.1)
