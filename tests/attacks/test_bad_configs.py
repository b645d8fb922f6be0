"""A sample of the bad configs, and whether the checker would notice what it is there to notice."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from hf_fngd import FNGD, FNGDConfig, checks, hub
from hf_fngd.layers import select
from hf_fngd.settings import Settings
from tests.attacks import bad_configs
from tests.attacks.bad_values import Payload


def test_every_bad_config_gets_a_clear_error() -> None:
    assert bad_configs.attack(count=120, seed=7) == []


def accept_any_rate(patch: pytest.MonkeyPatch) -> None:
    field = Settings.__dataclass_fields__["lr"]
    patch.setattr(field, "metadata", MappingProxyType({**field.metadata, "check": lambda key, value: value}))


def take_the_last_of_equal_keys(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(hub, "_once", dict)


def read_files_of_any_size(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(hub, "MAX_BYTES", 2**27)


def match_without_a_limit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(select, "_PATTERN_TIMEOUT", 100.0)
    patch.setattr(bad_configs, "GIVE_UP", 2.0)


def unpickle(patch: pytest.MonkeyPatch) -> None:
    read = hub._read

    def read_pickles(file: Path) -> Mapping[str, Any]:
        data = file.read_bytes()
        if data.startswith(b"\x80"):
            pickle.loads(data)
        return read(file)

    patch.setattr(hub, "_read", read_pickles)


def name_no_key(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checks, "wrong_value", lambda key, value, accepted: ValueError(f"must be {accepted}"))


def raise_another_error(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checks, "wrong_type", lambda key, value, accepted: KeyError(f"{key} must be {accepted}"))


def show_the_whole_value(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checks, "shown", repr)


def write_a_log(patch: pytest.MonkeyPatch) -> None:
    def write(version: object) -> None:
        Path("/dev/null").write_text(f"{type(version)}")
        raise ValueError("config_version is wrong")

    patch.setattr("hf_fngd.config._check_version", write)


@pytest.fixture
def place(tmp_path: Path) -> bad_configs.Place:
    return bad_configs.Place(tmp_path)


def value(key: str, of: Any) -> Callable[[bad_configs.Place], bad_configs.Case]:
    return lambda place: bad_configs.Case(key, lambda: bad_configs.both(key, of), (key,))


def content(make: Callable[[Path], bytes]) -> Callable[[bad_configs.Place], bad_configs.Case]:
    def case(place: bad_configs.Place) -> bad_configs.Case:
        folder = place.folder(make(place.target))
        return bad_configs.Case("file", lambda: FNGDConfig.from_pretrained(folder), (hub.CONFIG_NAME,))

    return case


def version(place: bad_configs.Place) -> bad_configs.Case:
    return bad_configs.Case("version", lambda: FNGDConfig.from_dict({"config_version": 3}), ("config_version",))


def pattern(place: bad_configs.Place) -> bad_configs.Case:
    def run() -> None:
        FNGD(bad_configs.model(), target_modules=r"(a|aa)+b")

    return bad_configs.Case("pattern", run, ("regular expression",), seconds=4.0)


@pytest.mark.parametrize(
    ("mutate", "case", "noticed"),
    [
        (accept_any_rate, value("lr", -1), "only one of config and optimizer raised"),
        (take_the_last_of_equal_keys, content(lambda _: b'{"lr": 1, "lr": 2}'), "^accepted"),
        (read_files_of_any_size, content(lambda _: b"[" + b" " * 2**26), "MiB$"),
        (match_without_a_limit, pattern, "no answer"),
        (unpickle, content(lambda target: pickle.dumps(Payload(target))), "a command was executed"),
        (unpickle, content(lambda target: pickle.dumps(print)), "side effects: .*pickle.find_class"),
        (name_no_key, value("lr", -1), "does not name lr"),
        (raise_another_error, value("coefficient_steps", "1"), "^KeyError"),
        (show_the_whole_value, value("coefficient_steps", "1" * 5000), "a message of"),
        (write_a_log, version, "side effects: .*open"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_validator_that_is_broken_is_noticed(
    mutate: Callable[[pytest.MonkeyPatch], None],
    case: Callable[[bad_configs.Place], bad_configs.Case],
    noticed: str,
    place: bad_configs.Place,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attack = case(place)
    assert bad_configs.fault(attack, place) is None
    mutate(monkeypatch)
    assert re.search(noticed, bad_configs.fault(attack, place) or "nothing is wrong")
