"""FNGDConfig without any file: defaults, validation, dictionaries, presets, versions."""

import dataclasses
import inspect
import json
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_fngd import arguments
from hf_fngd.config import CONFIG_VERSION, PRESETS, FNGDConfig
from hf_fngd.optimizer import FNGD
from hf_fngd.sharing import SharingPolicy, register_policy
from hf_fngd.sharing.base import _POLICIES
from tests.test_arguments import GOOD, WRONG_TYPES, WRONG_VALUES, rows

names = st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=5)
patterns = st.sampled_from(["all-linear", r".*\.fc[12]", "(?:encoder|decoder)\\..*", "é+"])
counts = st.integers(min_value=1, max_value=arguments.MAX_INTEGER)
fractions = st.floats(min_value=0, max_value=1, exclude_max=True)
not_negative = st.floats(min_value=0, allow_infinity=False) | st.integers(min_value=0, max_value=10**300)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
values = st.fixed_dictionaries(
    {},
    optional={
        "lr": not_negative,
        "momentum": fractions,
        "damping": positive,
        "weight_decay": not_negative,
        "sharing": st.sampled_from(arguments.SHARING),
        "refresh": st.none() | st.just(0) | counts,
        "coefficient_steps": st.none() | counts,
        "step_scale": st.sampled_from(arguments.STEP_SCALES),
        "update": st.sampled_from(arguments.UPDATES),
        "fallback": st.sampled_from(arguments.FALLBACKS),
        "fallback_lr": st.none() | not_negative,
        "beta2": fractions,
        "eps": positive,
        "memory_budget": counts,
        "target_modules": patterns | names | names.map(tuple),
        "exclude_modules": st.none() | patterns | names | st.just([]),
        "weigh_rest": st.booleans(),
        "strict": st.booleans(),
    },
)


def test_fields_are_the_arguments_in_order_each_with_help():
    fields = dataclasses.fields(FNGDConfig)
    assert tuple(field.name for field in fields) == arguments.ARGUMENTS
    assert all(field.metadata["help"].endswith(".") for field in fields)


def test_names_and_defaults_are_the_optimizers():
    _, _, *parameters = inspect.signature(FNGD.__init__).parameters.values()
    assert {p.name: p.default for p in parameters} == FNGDConfig().optimizer_arguments()


def test_reals_are_the_float_fields():
    hints = typing.get_type_hints(FNGDConfig)
    assert {key for key in arguments.ARGUMENTS if "float" in str(hints[key])} == set(arguments.REALS)


@given(values)
def test_round_trip(given_values):
    config = FNGDConfig(**given_values)
    assert FNGDConfig.from_dict(config.to_dict()) == config
    text = config.to_json_string()
    again = FNGDConfig.from_dict(json.loads(text))
    assert again == config
    assert again.to_json_string() == text


@pytest.mark.parametrize(("key", "value"), rows(GOOD))
def test_accepts(key, value):
    assert FNGDConfig(**{key: value}).to_dict()[key] == (list(value) if isinstance(value, tuple) else value)


@pytest.mark.parametrize(("key", "value"), rows(WRONG_TYPES))
def test_a_wrong_type_is_refused_by_name(key, value):
    for make in (lambda: FNGDConfig(**{key: value}), lambda: FNGDConfig.from_dict({key: value})):
        with pytest.raises(TypeError, match=f"^{key}"):
            make()


@pytest.mark.parametrize(("key", "value"), rows(WRONG_VALUES))
def test_a_wrong_value_is_refused_by_name(key, value):
    for make in (lambda: FNGDConfig(**{key: value}), lambda: FNGDConfig.from_dict({key: value})):
        with pytest.raises(ValueError, match=f"^{key}"):
            make()


@pytest.mark.parametrize("key", arguments.REALS)
def test_an_int_is_stored_as_a_float(key):
    number = 1 if key in ("damping", "eps") else 0
    config = FNGDConfig.from_dict(json.loads(json.dumps({key: number})))
    assert type(getattr(config, key)) is float
    assert getattr(config, key) == number


def test_json_is_sorted_and_ends_in_a_newline():
    text = FNGDConfig().to_json_string()
    keys = list(json.loads(text))
    assert keys == sorted([*arguments.ARGUMENTS, "config_version"])
    assert text.startswith('{\n  "beta2": 0.999,\n')
    assert text.endswith("\n}\n")


def test_optimizer_arguments_are_all_of_them_and_a_copy():
    config = FNGDConfig(target_modules=["fc1"])
    given_to_optimizer = config.optimizer_arguments()
    assert tuple(given_to_optimizer) == arguments.ARGUMENTS
    given_to_optimizer["target_modules"].append("fc2")
    assert config.target_modules == ["fc1"]


def test_a_list_is_not_shared_with_the_caller():
    listed = ["fc1"]
    config = FNGDConfig(target_modules=listed)
    listed.append("fc2")
    assert config.target_modules == ["fc1"]


@pytest.mark.parametrize("use", [FNGDConfig.to_dict, FNGDConfig.to_json_string, FNGDConfig.optimizer_arguments])
def test_a_change_is_validated_before_it_leaves(use):
    config = FNGDConfig()
    config.damping = -1.0
    with pytest.raises(ValueError, match=r"^damping"):
        use(config)


def test_unknown_keys_are_ignored_with_one_warning():
    with pytest.warns(UserWarning, match="FNGDConfig does not know: warmup, depth$") as caught:
        config = FNGDConfig.from_dict({"lr": 0.5, "warmup": 3, "depth": [[[]]]})
    assert len(caught) == 1
    assert config == FNGDConfig(lr=0.5)


def test_a_flood_of_unknown_keys_stays_readable():
    with pytest.warns(UserWarning, match="and 990 more$") as caught:
        FNGDConfig.from_dict({f"{i}" + "x" * 1000: 0 for i in range(1000)})
    assert len(str(caught[0].message)) < 1000


def test_a_misspelt_key_is_told_what_it_is_meant_to_be():
    with pytest.warns(UserWarning, match=r"does not know: dampning \(meant to be 'damping'\?\)$"):
        assert FNGDConfig.from_dict({"dampning": 0.5}) == FNGDConfig()


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("a\nb", r"'a\\nb'"),
        ("\x1b[31m", r"'\\x1b\[31m'"),
        ("\ud800", r"'\\ud800'"),
        pytest.param(10**5000, "a key of type int", id="huge"),
    ],
)
def test_an_odd_key_is_shown_in_plain_characters(key, shown):
    with pytest.warns(UserWarning, match=f"does not know: {shown}$"):
        assert FNGDConfig.from_dict({key: 0}) == FNGDConfig()


def test_overrides_win_and_may_not_be_unknown():
    assert FNGDConfig.from_dict({"lr": "broken", "eps": 0.5}, lr=0.1) == FNGDConfig(lr=0.1, eps=0.5)
    with pytest.raises(ValueError, match="no argument 'learning_rate'"):
        FNGDConfig.from_dict({}, learning_rate=0.1)


@pytest.mark.parametrize("given_values", [None, [], "lr", 3, [("lr", 0.1)]])
def test_only_a_mapping_is_a_dictionary(given_values):
    with pytest.raises(TypeError, match="must be a mapping"):
        FNGDConfig.from_dict(given_values)


def test_version_is_written():
    assert FNGDConfig().to_dict()["config_version"] == CONFIG_VERSION


def test_a_newer_minor_or_no_version_is_read():
    major = CONFIG_VERSION.split(".")[0]
    assert FNGDConfig.from_dict({"config_version": f"{major}.9999"}) == FNGDConfig()
    assert FNGDConfig.from_dict({}) == FNGDConfig()


def test_a_newer_major_is_refused():
    newer = f"{int(CONFIG_VERSION.split('.')[0]) + 1}.0"
    with pytest.raises(ValueError, match=f"config_version is {newer}.*pip install --upgrade hf-fngd"):
        FNGDConfig.from_dict({"config_version": newer})


@pytest.mark.parametrize("version", ["", "1", "1.", "v1.0", "1.0.0", "0.9", "-1.0", "1.0\n", "9" * 5000 + ".0"])
def test_a_malformed_version_is_refused(version):
    with pytest.raises(ValueError, match=r"^config_version must be MAJOR\.MINOR"):
        FNGDConfig.from_dict({"config_version": version})


@pytest.mark.parametrize("version", [1.0, 1, None, ["1.0"]])
def test_a_version_of_a_wrong_type_is_refused(version):
    with pytest.raises(TypeError, match=r"^config_version must be a string"):
        FNGDConfig.from_dict({"config_version": version})


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_what_they_say(name):
    config = FNGDConfig.preset(name)
    departures = {key: value for key, value in PRESETS[name].items() if value != getattr(FNGDConfig(), key)}
    assert config == FNGDConfig(**departures)
    assert FNGDConfig.load(name) == config
    assert FNGDConfig.load(name, lr=0.5) == FNGDConfig.preset(name, lr=0.5) == dataclasses.replace(config, lr=0.5)


def test_a_registered_policy_is_a_value_like_ours(monkeypatch):
    monkeypatch.setattr("hf_fngd.sharing.base._POLICIES", dict(_POLICIES))
    with pytest.raises(ValueError, match="sharing must be one of"):
        FNGDConfig(sharing="mine")
    register_policy(type("Mine", (SharingPolicy,), {"name": "mine"}))
    assert FNGDConfig.from_dict(FNGDConfig(sharing="mine").to_dict()).sharing == "mine"


def test_the_paper_preset_is_the_paper():
    paper = FNGDConfig.preset("paper")
    assert (paper.sharing, paper.refresh, paper.step_scale) == ("replay", 0, "ngd")
    assert (paper.update, paper.fallback) == ("momentum", "sgd")


def test_the_default_preset_is_the_defaults():
    assert FNGDConfig.preset("default") == FNGDConfig()


def test_an_unknown_preset_or_override_is_refused():
    with pytest.raises(
        ValueError, match="no preset 'Paper': the presets are default, paper, robust; did you mean 'paper'"
    ):
        FNGDConfig.preset("Paper")
    for name in (None, ["paper"], b"paper"):
        with pytest.raises(TypeError, match="a preset's name must be one of default, paper, robust, got a"):
            FNGDConfig.preset(name)
    with pytest.raises(ValueError, match="no argument 'step'"):
        FNGDConfig.preset("paper", step="rms")
    with pytest.raises(TypeError, match=r"^lr "):
        FNGDConfig.preset("paper", lr="0.1")
