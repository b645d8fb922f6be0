"""FNGDConfig without any file: round trips, dictionaries, presets, versions, and files of version 1."""

import dataclasses
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_fngd import FNGD
from hf_fngd.checks import MAX_INTEGER
from hf_fngd.config import CONFIG_VERSION, PRESETS, FNGDConfig
from hf_fngd.layers.base import layer_type_names
from hf_fngd.settings import setting_names
from hf_fngd.updates import FALLBACK_RULES
from hf_fngd.weights.base import policy_class, policy_names
from tests.nets import UPDATES, net
from tests.refusals import refusal

names = st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=5)
patterns = st.sampled_from(["all-linear", r".*\.fc[12]", "(?:encoder|decoder)\\..*", "é+"])
counts = st.integers(min_value=1, max_value=MAX_INTEGER)
fractions = st.floats(min_value=0, max_value=1, exclude_max=True)
not_negative = st.floats(min_value=0, allow_infinity=False) | st.integers(min_value=0, max_value=10**300)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
groups = st.fixed_dictionaries(
    {"params": patterns | names | names.map(tuple)},
    optional={"lr": not_negative, "weight_decay": not_negative, "update": st.sampled_from(["muon", "adam"])},
)
values = st.fixed_dictionaries(
    {},
    optional={
        "lr": not_negative,
        "momentum": fractions,
        "weight_decay": not_negative,
        "sharing": st.sampled_from(policy_names()),
        "damping": positive,
        "coefficient_steps": st.none() | counts,
        "update": st.sampled_from(UPDATES),
        "block_size": counts,
        "ns_steps": st.integers(1, 100),
        "fallback": st.sampled_from(list(FALLBACK_RULES)),
        "fallback_lr": st.none() | not_negative,
        "beta2": fractions,
        "eps": positive,
        "param_groups": st.lists(groups, min_size=1, max_size=3),
        "memory_budget": counts,
        "target_modules": patterns | names | names.map(tuple),
        "exclude_modules": st.none() | patterns | names | st.just([]),
        "layer_types": st.none() | st.lists(st.sampled_from(layer_type_names()), min_size=1),
        "strict": st.booleans(),
    },
)


def readable(given_values: dict[str, Any]) -> dict[str, Any]:
    """Without what nothing would read."""
    policy = policy_class(given_values.get("sharing", "clipped"))
    unread = {"damping", "coefficient_steps", "memory_budget"} - set(policy.reads)
    rules = {given_values.get("update"), *(group.get("update") for group in given_values.get("param_groups", []))}
    unread |= set() if "block_muon" in rules else {"block_size"}
    unread |= set() if rules & {"muon", "block_muon"} or given_values.get("update") is None else {"ns_steps"}
    if given_values.get("update") == "momentum" and not policy.solves:
        unread |= {"update"}
    elif (
        given_values.get("update") == "momentum"
        and given_values.get("fallback") == "sgd"
        and rules <= {"momentum", None}
    ):
        unread |= {"beta2", "eps"}
    return {key: value for key, value in given_values.items() if key not in unread}


@given(values.map(readable))
def test_round_trip(given_values: dict[str, Any]) -> None:
    config = FNGDConfig(**given_values)
    assert FNGDConfig.from_dict(config.to_dict()) == config
    text = config.to_json_string()
    again = FNGDConfig.from_dict(json.loads(text))
    assert again == config
    assert again.to_json_string() == text


def test_json_is_sorted_and_ends_in_a_newline() -> None:
    text = FNGDConfig().to_json_string()
    assert list(json.loads(text)) == sorted([*setting_names(), "config_version"])
    assert text.startswith('{\n  "batch_dim": null,\n')
    assert text.endswith("\n}\n")


def test_optimizer_arguments_are_all_of_them_and_a_copy() -> None:
    config = FNGDConfig(lr=1e-2, target_modules=["fc1"])
    given_to_optimizer = config.optimizer_arguments()
    assert tuple(given_to_optimizer) == setting_names()
    given_to_optimizer["target_modules"].append("fc2")
    assert config.target_modules == ["fc1"]
    assert FNGD.from_config(net(), config).settings.values() == config.values()


# Dictionaries that need not be trusted ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "shown"),
    [
        ({"warmup": 3, "depth": [[[]]]}, "warmup, depth"),
        ({"dampning": 0.5}, r"dampning \(meant to be 'damping'\?\)"),
        ({f"{i}" + "x" * 1000: 0 for i in range(1000)}, ".* and 990 more"),
        ({"a\nb": 0}, r"'a\\nb'"),
        ({"\x1b[31m": 0}, r"'\\x1b\[31m'"),
        ({"\ud800": 0}, r"'\\ud800'"),
        ({10**5000: 0}, "a key of type int"),
    ],
    ids=["unknown", "misspelt", "many", "newline", "escape", "surrogate", "huge"],
)
def test_unknown_keys_are_ignored_with_one_warning(keys: dict[Any, Any], shown: str) -> None:
    with pytest.warns(UserWarning, match=f"FNGDConfig does not know: {shown}$") as caught:
        config = FNGDConfig.from_dict({"lr": 0.5, **keys})
    assert len(caught) == 1
    assert len(str(caught[0].message)) < 1000
    assert config == FNGDConfig(lr=0.5)


def test_overrides_win_and_may_not_be_unknown() -> None:
    assert FNGDConfig.from_dict({"lr": "broken", "eps": 0.5}, lr=0.1) == FNGDConfig(lr=0.1, eps=0.5)
    for make in (FNGDConfig.from_dict, FNGDConfig.preset):
        with pytest.raises(TypeError, match=r"FNGD has no argument 'learning_rate', it has lr.*; use lr"):
            make({} if make == FNGDConfig.from_dict else "paper", learning_rate=0.1)


@pytest.mark.parametrize("given_values", [None, [], "lr", 3, [("lr", 0.1)]])
def test_only_a_mapping_is_a_dictionary(given_values: Any) -> None:
    with pytest.raises(TypeError, match="must be a mapping"):
        FNGDConfig.from_dict(given_values)


# Versions --------------------------------------------------------------------------------------------------

MAJOR = int(CONFIG_VERSION.split(".")[0])


def test_the_version_is_written_and_a_newer_minor_or_none_is_read() -> None:
    assert FNGDConfig().to_dict()["config_version"] == CONFIG_VERSION
    assert FNGDConfig.from_dict({"config_version": f"{MAJOR}.9999"}) == FNGDConfig.from_dict({}) == FNGDConfig()


@pytest.mark.parametrize(
    ("version", "error", "message"),
    [
        (f"{MAJOR + 1}.0", ValueError, f"config_version is {MAJOR + 1}.0.*pip install --upgrade hf-fngd"),
        *(
            (version, ValueError, r"^config_version must be MAJOR\.MINOR")
            for version in ("", "1", "1.", "v1.0", "1.0.0", "0.9", "-1.0", "1.0\n", "\u0661.0", "9" * 10**5 + ".0")
        ),
        *((version, TypeError, "^config_version must be a string") for version in (1.0, 1, None, ["1.0"], [10**5000])),
    ],
)
def test_another_version_is_refused(version: Any, error: type[Exception], message: str) -> None:
    found = refusal(lambda: FNGDConfig.from_dict({"config_version": version}))
    assert type(found) is error
    assert re.search(message, str(found))


# What hf_fngd 0.1.0 wrote: every argument.
VERSION_1 = {
    **{"config_version": "1.0", "lr": 0.001, "momentum": 0.9, "damping": 0.1, "weight_decay": 0.0},
    **{"sharing": "clipped", "refresh": None, "coefficient_steps": None, "step_scale": "rms"},
    **{"update": "muon", "fallback": "adamw", "fallback_lr": None, "beta2": 0.999, "eps": 1e-08},
    **{"memory_budget": 268435456, "target_modules": "all-linear", "exclude_modules": None},
    **{"weigh_rest": True, "strict": False},
}
PAPER_1 = {"sharing": "replay", "refresh": 0, "damping": 0.003, "step_scale": "ngd", "update": "momentum"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"update": "muon"}),
        (
            {"lr": 0.5, "fallback": "sgd", "strict": True},
            {"lr": 0.5, "fallback": "sgd", "strict": True, "update": "muon"},
        ),
        ({"refresh": 3, "coefficient_steps": 7, "damping": 0.5}, {"update": "muon"}),  # which "clipped" did not read
        ({"weigh_rest": False}, {"layer_types": ["linear", "conv1d"], "update": "muon"}),
        ({"sharing": "uniform", "update": "adam", "refresh": 9}, {"sharing": "uniform", "update": "adam"}),
        ({"sharing": "never", "damping": 0.5}, {"sharing": "never", "damping": 0.5, "update": "muon"}),
        # Whose first phase was at most 100 steps long.
        (PAPER_1 | {"fallback": "sgd", "weigh_rest": False}, {**PRESETS["paper"], "coefficient_steps": 100}),
        (PAPER_1 | {"update": "muon", "coefficient_steps": 7}, PAPER_1 | {"update": "muon", "coefficient_steps": 7}),
    ],
)
def test_a_file_of_version_1_means_what_it_meant(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    kept = {key: value for key, value in expected.items() if key not in ("refresh", "step_scale")}
    found, config = FNGDConfig.from_dict(VERSION_1 | changes), FNGDConfig(**kept)
    for name in setting_names():
        assert found.effective(name) == config.effective(name), name
    assert FNGDConfig.from_dict(found.to_dict()) == found


def test_the_default_of_version_1_was_muon() -> None:
    assert FNGDConfig.from_dict({"config_version": "1.0"}).update == "muon"


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        *(({"sharing": name}, f"sharing='{name}'") for name in ("index", "last", "ranked", "sketched")),
        ({"sharing": "replay"}, "refresh=None"),
        (PAPER_1 | {"refresh": 5}, "refresh=5"),
        ({"sharing": "never", "update": "momentum"}, "update='momentum' with step_scale='rms'"),
    ],
)
def test_settings_of_version_1_that_are_gone_name_the_last_version_that_has_them(
    changes: dict[str, Any], gone: str
) -> None:
    with pytest.raises(ValueError, match=rf"has {gone}, which .* does not have: use version 0\.1\.0 \(commit \w+\)"):
        FNGDConfig.from_dict(VERSION_1 | changes)


# Presets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_what_they_say(name: str) -> None:
    config = FNGDConfig.preset(name)
    departures = {key: value for key, value in PRESETS[name].items() if value != getattr(FNGDConfig(), key)}
    assert departures == dict(PRESETS[name])
    assert config == FNGDConfig(**departures)
    assert FNGDConfig.load(name) == FNGDConfig.load(name, local_files_only=True, revision="main") == config
    assert FNGDConfig.load(name, lr=0.5) == FNGDConfig.preset(name, lr=0.5) == dataclasses.replace(config, lr=0.5)


def test_the_paper_preset_is_the_paper() -> None:
    paper = FNGDConfig.preset("paper")
    assert (paper.sharing, paper.coefficient_steps) == ("replay", None)  # those of the whole first epoch
    assert (paper.update, paper.fallback, paper.layer_types) == ("momentum", "sgd", ["linear", "conv1d"])
    assert FNGDConfig.preset("default") == FNGDConfig()


def test_an_unknown_preset_or_a_bad_override_is_refused() -> None:
    with pytest.raises(ValueError, match="no preset 'Paper': the presets are default, paper; did you mean 'paper'"):
        FNGDConfig.preset("Paper")
    for name in (None, ["paper"], b"paper"):
        with pytest.raises(TypeError, match="a preset's name must be one of default, paper, got a"):
            FNGDConfig.preset(name)
    with pytest.raises(TypeError, match=r"^lr "):
        FNGDConfig.preset("paper", lr="0.1")
