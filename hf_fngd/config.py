"""FNGD's settings as a dataclass that can be saved, shared and read back, by `hf_fngd.hub`."""

import copy
import dataclasses
import json
import logging
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

from hf_fngd.checks import guess, shown
from hf_fngd.engine.state import GONE
from hf_fngd.hub import HUB_OPTIONS, HubMixin
from hf_fngd.settings import READ_BY_POLICIES, READ_BY_RULES, Settings, setting_names
from hf_fngd.weights.base import SharingPolicy, policy_class, policy_names

logger = logging.getLogger(__name__)

CONFIG_VERSION = "2.0"
"""MAJOR.MINOR of the file format: MAJOR changes where an older reader would misunderstand a file."""

# arXiv 2403.03473 as it is written: coefficients of the first epoch only, steps of 1/lambda', plain gradients on every
# other layer.
_PAPER = {"damping": 0.003, "sharing": "replay", "update": "momentum", "fallback": "sgd"}
_PAPER |= {"layer_types": ["linear", "conv1d"]}
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"default": MappingProxyType({}), "paper": MappingProxyType(_PAPER)}
)
"""Departures from the defaults, by the name of the preset."""


# What TrainingArguments calls arguments of FNGD.
TRAINING_ARGS = {
    "lr": "learning_rate",
    "weight_decay": "weight_decay",
    "momentum": "adam_beta1",
    "beta2": "adam_beta2",
    "eps": "adam_epsilon",
}


@dataclass(frozen=True)
class FNGDConfig(Settings, HubMixin):
    """The arguments of `FNGD`, the model aside, with the errors of `hf_fngd.settings.Settings`."""

    def __post_init__(self) -> None:
        if isinstance(self.sharing, SharingPolicy):
            raise TypeError(
                f"sharing must be a policy's name in a config, got a {type(self.sharing).__name__}: register the "
                "policy and give its name, or hand the object to FNGD itself"
            )
        super().__post_init__()
        for number, group in enumerate(self.param_groups or ()):
            if any(not isinstance(entry, str) for entry in group["params"]):
                raise TypeError(
                    f"param_groups[{number}]['params'] must hold names in a config, got Parameters: give their names, "
                    "or hand the group to FNGD itself, whose config has the names"
                )

    def optimizer_arguments(self) -> dict[str, Any]:
        """Return a copy of all of FNGD's keyword arguments, for ``FNGD(model, **arguments)``."""
        return copy.deepcopy(self.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the values and ``config_version``, in types that JSON knows."""
        return {"config_version": CONFIG_VERSION, **self.optimizer_arguments()}

    def to_json_string(self) -> str:
        """Return the text of ``fngd_config.json``: sorted keys, an indent of 2, a newline at the end."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **overrides: Any) -> Self:
        """Build a config from a dictionary, which need not be trusted; ``overrides`` replace what it says.

        Unknown keys are left out with a warning, for a later version may have written them.

        Raises:
            TypeError: ``values`` is no mapping, an override is no argument of FNGD's, or a value has the wrong type.
            ValueError: a value is out of range, or the format is later than this version of the package reads.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"a config must be a mapping from argument names, got a {type(values).__name__}")
        if _check_version(values.get("config_version", CONFIG_VERSION)) == 1:
            values = _of_version_1({**values, **overrides})
        known = {key: value for key, value in values.items() if key in setting_names()}
        if unknown := [_named(key) for key in values if key not in known and key != "config_version"]:
            listed = ", ".join(unknown[:10]) + (f" and {len(unknown) - 10} more" if len(unknown) > 10 else "")
            warnings.warn(f"ignored keys that {cls.__name__} does not know: {listed}", stacklevel=2)
        return cls.of("FNGD", {**known, **overrides})

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """Build the config of the preset "default" or "paper"; ``overrides`` replace what it says.

        Raises ValueError or TypeError where there is no such preset, or an override is not acceptable.
        """
        if not isinstance(name, str):
            raise TypeError(f"a preset's name must be one of {', '.join(PRESETS)}, got a {type(name).__name__}")
        if name not in PRESETS:
            presets = f"the presets are {', '.join(PRESETS)}{guess(name, PRESETS)}"
            raise ValueError(f"there is no preset {name[:80]!r}: {presets}")
        return cls.from_dict(PRESETS[name], **overrides)

    @classmethod
    def load(cls, name: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Build a config from the name of a preset, a local path or a repository's id, tried in this order.

        A folder that is called as a preset is reached by ``"./paper"``. ``kwargs`` and errors are those of
        `from_pretrained`.
        """
        if not isinstance(name, str) or name not in PRESETS:
            try:
                return cls.from_pretrained(name, **kwargs)
            except OSError as error:
                if hint := guess(name, PRESETS, "There is no such preset either: did you mean {}?"):
                    error.add_note(hint)
                raise
        return cls.preset(name, **{key: value for key, value in kwargs.items() if key not in HUB_OPTIONS})


def _named(key: object) -> str:
    if not isinstance(key, str):
        return f"a key of type {type(key).__name__}"
    printable = key[:80] if key[:80].isprintable() else ascii(key[:80])
    return printable + guess(key, setting_names(), " (meant to be {}?)")


def _check_version(version: object) -> int:
    """The MAJOR part of a format's version. A format that this version of the package may misunderstand is refused."""
    if not isinstance(version, str):
        raise TypeError(f"config_version must be a string such as {CONFIG_VERSION!r}, got a {type(version).__name__}")
    parts = re.fullmatch(r"([1-9][0-9]{0,3})\.[0-9]{1,4}", version)
    if parts is None:
        raise ValueError(f"config_version must be MAJOR.MINOR such as {CONFIG_VERSION!r}, got {version[:80]!r}")
    if int(parts[1]) > int(CONFIG_VERSION.split(".")[0]):
        raise ValueError(
            f"config_version is {version}, and this version of hf-fngd reads up to {CONFIG_VERSION}: "
            "upgrade it with `pip install --upgrade hf-fngd`"
        )
    return int(parts[1])


def _of_version_1(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a file of hf_fngd 0.1.0. It wrote every argument, even those that its other settings did not use."""
    found = {"update": "muon", **values}  # its default
    scale, refresh, rest = found.pop("step_scale", "rms"), found.pop("refresh", None), found.pop("weigh_rest", True)
    sharing, momentum = found.get("sharing", "clipped"), found.get("update") == "momentum"
    gone = None
    if sharing in GONE:
        gone = f"sharing={sharing!r}"
    elif sharing == "replay" and refresh != 0:  # None meant 50
        gone = f"refresh={shown(refresh)}"
    elif momentum and scale != "ngd":
        gone = "update='momentum' with step_scale='rms'"
    if gone is not None:
        raise ValueError(
            f"the config was written for hf-fngd 0.1.0 and has {gone}, which this version does not have: use version "
            "0.1.0 (commit 2cdc4ef), or another setting"
        )
    if rest is False:
        found["layer_types"] = ["linear", "conv1d"]
    if sharing == "replay" and found.get("coefficient_steps") is None:
        found["coefficient_steps"] = 100
    unread = set(READ_BY_RULES) if momentum and found.get("fallback") == "sgd" else set()
    if sharing in policy_names():
        unread |= set(READ_BY_POLICIES) - set(policy_class(sharing).reads)
    return {key: value for key, value in found.items() if key not in unread}


def set_in(args: Any, config: FNGDConfig, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """FNGD's arguments that were set in TrainingArguments. Raises ValueError if the config sets another value."""
    defaults = {f.name: f.default for f in dataclasses.fields(args)} if dataclasses.is_dataclass(args) else {}
    chosen = {}
    for name, theirs in TRAINING_ARGS.items():
        if name in overrides or not hasattr(args, theirs) or getattr(args, theirs) == defaults.get(theirs):
            continue
        value, own = getattr(args, theirs), getattr(config, name)
        if own not in (getattr(Settings, name), value):
            raise ValueError(
                f"TrainingArguments has {theirs}={value!r} and the config has {name}={own!r}: leave one of them at its "
                "default, or give them the same value"
            )
        chosen[name] = value
    return chosen


def tell_of_rate(args: Any, config: Settings, own: Settings) -> None:
    """Log that FNGD has a default learning rate, where neither the config nor TrainingArguments set one."""
    theirs = getattr(args, "learning_rate", None)
    if config.lr is None and theirs not in (None, own.lr):
        logger.warning(
            "learning_rate=%g is the default of TrainingArguments, which nobody chose: FNGD takes its own, lr=%g. Set "
            "learning_rate, or lr in the config",
            theirs,
            own.lr,
        )


def ignored_in(args: Any, config: Settings, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What was set in TrainingArguments, by its names there, and is not the config's value nor overridden."""
    defaults = {f.name: f.default for f in dataclasses.fields(args)} if dataclasses.is_dataclass(args) else {}
    names = {theirs: own for own, theirs in TRAINING_ARGS.items() if own not in overrides and theirs in defaults}
    values = {theirs: getattr(args, theirs) for theirs in names}
    return {name: v for name, v in values.items() if v not in (defaults[name], config.effective(names[name]))}
