"""FNGD's settings as a dataclass that can be saved, shared and read back.

Values are checked by :mod:`hf_fngd.arguments`, files and the Hub are the business of :mod:`hf_fngd.hub`; this
module does no I/O of its own.
"""

import dataclasses
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Self

from hf_fngd import arguments
from hf_fngd.hub import HubMixin
from hf_fngd.sharing import policy_names

CONFIG_VERSION = "1.0"
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
                "refresh": 0,
                "coefficient_steps": 100_000,
                "step_scale": "ngd",
                "update": "momentum",
                "fallback": "sgd",
                "weigh_rest": False,
            }
        ),
        # Noisy labels: low damping keeps the model from memorizing them, as long as every step has its own weights.
        "robust": MappingProxyType({"damping": 0.001, "sharing": "sketched", "update": "adam"}),
    }
)
"""Departures from the defaults, by the name of the preset."""


@dataclass
class FNGDConfig(HubMixin):
    """The arguments of :class:`FNGD`, the model aside.

    The values are validated when the config is made, and again when it is written or handed to the optimizer.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range. Either message names the argument, value and what is accepted.
    """

    lr: float = field(
        default=1e-3,
        metadata={
            "help": "Learning rate, >= 0. The RMS of an update is 0.2 lr with update 'muon', about lr with the others."
        },
    )
    momentum: float = field(default=0.9, metadata={"help": "Momentum of the preconditioned gradient, in [0, 1)."})
    damping: float = field(
        default=0.1,
        metadata={"help": "alpha > 0 of lambda = alpha ||K||_F (Eq. 14 of arXiv 2403.03473), dimensionless."},
    )
    weight_decay: float = field(
        default=0.0, metadata={"help": "Decoupled weight decay, >= 0; none on biases and norms."}
    )
    sharing: str = field(
        default="clipped",
        metadata={
            "help": "Which weights the samples get, and how steps share them: " + ", ".join(arguments.SHARING) + "."
        },
    )
    refresh: int | None = field(
        default=None,
        metadata={
            "help": "Steps between coefficient steps after the first phase; 0: never, as in the paper; None: 50, or 0 "
            "where they would serve nothing."
        },
    )
    coefficient_steps: int | None = field(
        default=None,
        metadata={
            "help": "Most steps of the first phase, in which every step computes coefficients, >= 1; None: 100, or no "
            "first phase where they would serve nothing."
        },
    )
    step_scale: str = field(
        default="rms",
        metadata={"help": "'rms': updates of known size; 'ngd': the paper's 1/lambda', with a trust region."},
    )
    update: str = field(
        default="muon",
        metadata={"help": "Update rule on the preconditioned gradient: " + ", ".join(arguments.UPDATES) + "."},
    )
    fallback: str = field(
        default="adamw",
        metadata={"help": "Update rule of what is not preconditioned: " + ", ".join(arguments.FALLBACKS) + "."},
    )
    fallback_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the fallback, >= 0; None: the same as lr."}
    )
    beta2: float = field(
        default=0.999,
        metadata={"help": "Decay of the second moment of update 'adam' and fallback 'adamw', in [0, 1)."},
    )
    eps: float = field(
        default=1e-8,
        metadata={"help": "Term > 0 in the denominator of update 'adam' and fallback 'adamw'."},
    )
    memory_budget: int = field(
        default=2**28, metadata={"help": "Bounds of the store, and of a coefficient step's temporary memory, in bytes."}
    )
    target_modules: str | list[str] = field(
        default=arguments.ALL_LINEAR,
        metadata={
            "help": "Modules to precondition: 'all-linear', a regular expression that matches the whole "
            "name, or a list of names or dotted suffixes."
        },
    )
    exclude_modules: str | list[str] | None = field(
        default=None,
        metadata={"help": "Modules to leave out: None, a regular expression or a list, as in target_modules."},
    )
    weigh_rest: bool = field(
        default=True,
        metadata={"help": "Weigh the samples in embeddings, tied heads and convolutions of raw input too."},
    )
    strict: bool = field(
        default=False, metadata={"help": "Raise where the coverage report would only tell of a missed layer."}
    )

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check every value, and bring it into the form that a JSON file gives back.

        Ints of real-valued arguments become floats, tuples of module names become lists.

        Raises:
            TypeError: A value has the wrong type.
            ValueError: A value is out of range.
        """
        values = {key: getattr(self, key) for key in arguments.ARGUMENTS}
        _check(values)
        for key, value in values.items():
            if key in arguments.REALS and value is not None:
                setattr(self, key, float(value))
            elif isinstance(value, list | tuple):
                setattr(self, key, list(value))

    def optimizer_arguments(self) -> dict[str, Any]:
        """Return FNGD's keyword arguments, every one of them, as ``FNGD(model, **arguments)`` takes them."""
        self.validate()
        return dataclasses.asdict(self)

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
            values: Values by argument name, as :meth:`to_dict` returns them; what is missing takes its
                default. Keys that are no arguments of FNGD's are left out with a warning, for a later version
                may have written them.
            **overrides: Arguments that replace those in ``values``.

        Returns:
            The config, validated.

        Raises:
            TypeError: ``values`` is no mapping, or a value has the wrong type.
            ValueError: A value is out of range, an override is no argument of FNGD's, or ``config_version``
                is of a later format than this version of the package reads.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"a config must be a mapping from argument names, got a {type(values).__name__}")
        _check(overrides)
        _check_version(values.get("config_version", CONFIG_VERSION))
        known = {key: value for key, value in values.items() if key in arguments.ARGUMENTS}
        unknown = [_named(key) for key in values if key not in known and key != "config_version"]
        if unknown:
            listed = ", ".join(unknown[:10]) + (f" and {len(unknown) - 10} more" if len(unknown) > 10 else "")
            warnings.warn(f"ignored keys that {cls.__name__} does not know: {listed}", stacklevel=2)
        return cls(**{**known, **overrides})

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """Build the config of a preset.

        Args:
            name: ``"default"``, ``"paper"`` (arXiv 2403.03473 as it is written) or ``"robust"`` (noisy
                labels).
            **overrides: Arguments that replace the preset's.

        Raises:
            ValueError: There is no such preset, or an override is not acceptable.
            TypeError: The name is no string, or an override has the wrong type.
        """
        if not isinstance(name, str):
            raise TypeError(f"a preset's name must be one of {', '.join(PRESETS)}, got a {type(name).__name__}")
        if name not in PRESETS:
            raise ValueError(
                f"there is no preset {name[:80]!r}: the presets are {', '.join(PRESETS)}"
                + arguments.guess(name, PRESETS)
            )
        return cls.from_dict(PRESETS[name], **overrides)

    @classmethod
    def load(
        cls,
        name: str | os.PathLike[str],
        *,
        subfolder: str = "",
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **overrides: Any,
    ) -> Self:
        """Build a config from the name of a preset, a local path or a repository's id, tried in this order.

        Args:
            name: The name. A folder that is called as a preset is reached by ``"./paper"``.
            subfolder: See :meth:`from_pretrained`, as for the others; a preset needs none of them.
            revision: Branch, tag or commit of the repository.
            cache_dir: Folder of the Hub's cache.
            token: Access token for a private repository.
            local_files_only: Never ask the Hub.
            force_download: Download again what the cache has.
            **overrides: Arguments that replace the config's.

        Raises:
            OSError: There is no preset, no local path and no repository of this name.
            ValueError: A value is not acceptable.
            TypeError: A value has the wrong type.
        """
        if isinstance(name, str) and name in PRESETS:
            return cls.preset(name, **overrides)
        return cls.from_pretrained(
            name,
            subfolder=subfolder,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
            **overrides,
        )


def _named(key: object) -> str:
    """A key as it is where it can be shown, and what it is probably meant to be."""
    if not isinstance(key, str):
        return f"a key of type {type(key).__name__}"
    shown = key[:80] if key[:80].isprintable() else ascii(key[:80])
    return shown + arguments.guess(key, arguments.ARGUMENTS, " (meant to be {}?)")


def _check_version(version: object) -> None:
    """Refuse a format that this version of the package cannot be sure to understand."""
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


def _check(values: Mapping[str, object]) -> None:
    # A policy of the user's is as good as ours: the optimizer takes it by its name too.
    arguments.validate(values, choices={"sharing": policy_names()})
