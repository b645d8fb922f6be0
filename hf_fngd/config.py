"""FNGD's settings as a dataclass that can be saved, shared and read back.

Values are checked by `hf_fngd.settings`, files and the Hub are the business of `hf_fngd.hub`; this module does no I/O
of its own.
"""

import copy
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

from hf_fngd.checks import guess
from hf_fngd.engine.state import GONE
from hf_fngd.hub import HUB_OPTIONS, HubMixin
from hf_fngd.settings import Settings, setting_names
from hf_fngd.weights.base import SharingPolicy, policy_class, policy_names

CONFIG_VERSION = "2.0"
"""MAJOR.MINOR of the file format: MAJOR changes where an older reader would misunderstand a file."""

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "default": MappingProxyType({}),
        # arXiv 2403.03473 as it is written: coefficients of the first epoch only, steps of 1/lambda', plain
        # gradients on every other layer.
        "paper": MappingProxyType(
            {
                "damping": 0.003,
                "sharing": "replay",
                "update": "momentum",
                "fallback": "sgd",
                "layer_types": ["linear", "conv1d"],
            }
        ),
    }
)
"""Departures from the defaults, by the name of the preset."""


@dataclass(frozen=True)
class FNGDConfig(Settings, HubMixin):
    """The arguments of `FNGD`, the model aside; for what they mean see `hf_fngd.settings.Settings`.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of range or has no effect. Either message names the argument, the value and what is
            accepted.
    """

    def __post_init__(self) -> None:
        if isinstance(self.sharing, SharingPolicy):
            raise TypeError(
                f"sharing must be a policy's name in a config, got a {type(self.sharing).__name__}: register the "
                "policy and give its name, or hand the object to FNGD itself"
            )
        super().__post_init__()

    def optimizer_arguments(self) -> dict[str, Any]:
        """Return FNGD's keyword arguments, every one of them, as ``FNGD(model, **arguments)`` takes them."""
        return copy.deepcopy(self.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the values and ``config_version``, in types that JSON knows."""
        return {"config_version": CONFIG_VERSION, **self.optimizer_arguments()}

    def to_json_string(self) -> str:
        """Return the text of ``fngd_config.json``: sorted keys, an indent of 2, a newline at the end."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **overrides: Any) -> Self:
        """Build a config from a dictionary, which need not be trusted.

        Args:
            values: values by argument name, as `to_dict` returns them. Keys that are no arguments of FNGD's are left
                out with a warning, for a later version may have written them.
            **overrides: arguments that replace those in ``values``.

        Raises:
            TypeError: ``values`` is no mapping, an override is no argument of FNGD's, or a value has the wrong type.
            ValueError: a value is out of range, or the format is later than this version of the package reads.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"a config must be a mapping from argument names, got a {type(values).__name__}")
        version = _check_version(values.get("config_version", CONFIG_VERSION))
        values = _of_version_1(values) if version == 1 else values
        known = {key: value for key, value in values.items() if key in setting_names()}
        unknown = [_named(key) for key in values if key not in known and key != "config_version"]
        if unknown:
            listed = ", ".join(unknown[:10]) + (f" and {len(unknown) - 10} more" if len(unknown) > 10 else "")
            warnings.warn(f"ignored keys that {cls.__name__} does not know: {listed}", stacklevel=2)
        return cls.of("FNGD", {**known, **overrides})

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """Build the config of a preset.

        Args:
            name: ``"default"`` or ``"paper"`` (arXiv 2403.03473 as it is written).
            **overrides: Arguments that replace the preset's.

        Raises:
            ValueError: There is no such preset, or an override is not acceptable.
            TypeError: The name is no string, or an override has the wrong type.
        """
        if not isinstance(name, str):
            raise TypeError(f"a preset's name must be one of {', '.join(PRESETS)}, got a {type(name).__name__}")
        if name not in PRESETS:
            raise ValueError(
                f"there is no preset {name[:80]!r}: the presets are {', '.join(PRESETS)}" + guess(name, PRESETS)
            )
        return cls.from_dict(PRESETS[name], **overrides)

    @classmethod
    def load(cls, name: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Build a config from the name of a preset, a local path or a repository's id, tried in this order.

        Args:
            name: the name. A folder that is called as a preset is reached by ``"./paper"``.
            **kwargs: arguments of `from_pretrained`, or of FNGD, which replace the config's.

        Raises:
            OSError: there is no preset, no local path and no repository of this name.
            ValueError: a value is not acceptable.
            TypeError: a value has the wrong type.
        """
        if not isinstance(name, str) or name not in PRESETS:
            return cls.from_pretrained(name, **kwargs)
        return cls.preset(name, **{key: value for key, value in kwargs.items() if key not in HUB_OPTIONS})


def _named(key: object) -> str:
    """A key as it is where it can be shown, and what it is probably meant to be."""
    if not isinstance(key, str):
        return f"a key of type {type(key).__name__}"
    printable = key[:80] if key[:80].isprintable() else ascii(key[:80])
    return printable + guess(key, setting_names(), " (meant to be {}?)")


def _check_version(version: object) -> int:
    """The MAJOR part of a format; a format is refused that this version of the package cannot be sure to understand."""
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
    """The keys of a file that hf_fngd 0.1.0 wrote: every argument, also those that its other settings did not read.

    Raises:
        ValueError: it has settings that are gone.
    """
    found = dict(values)
    scale, refresh, rest = found.pop("step_scale", "rms"), found.pop("refresh", None), found.pop("weigh_rest", True)
    sharing, momentum = found.get("sharing", "clipped"), found.get("update") == "momentum"
    refreshes = sharing == "replay" and refresh != 0  # None meant 50
    if sharing in GONE or refreshes or (momentum and scale != "ngd"):
        gone = f"refresh={refresh!r}" if refreshes else "update='momentum' with step_scale='rms'"
        gone = f"sharing={sharing!r}" if sharing in GONE else gone
        raise ValueError(
            f"the config was written for hf-fngd 0.1.0 and has {gone}, which this version does not have: use version "
            "0.1.0 (commit 2cdc4ef), or another setting"
        )
    if rest is False:
        found["layer_types"] = ["linear", "conv1d"]
    if sharing == "replay" and found.get("coefficient_steps") is None:
        found["coefficient_steps"] = 100
    if isinstance(sharing, str) and sharing in policy_names():
        reads = policy_class(sharing).reads
        for key in ("damping", "coefficient_steps", "memory_budget"):
            if key not in reads:
                found.pop(key, None)
    if momentum and found.get("fallback") == "sgd":
        found = {key: value for key, value in found.items() if key not in ("beta2", "eps")}
    return found
