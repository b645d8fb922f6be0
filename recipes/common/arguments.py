"""What the command lines of the recipes share: the optimizer's options, and defaults, then a YAML file, then words."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from baselines import BASELINES
from common.command_line import words
from common.controls import CONTROLS
from hf_fngd.config import PRESETS, FNGDConfig

# What FNGDConfig does not have: options of the baselines, and of fngd.
NOT_IN_CONFIG = ("fngd_config", "control")
_controls = "; ".join(f"{name}: {text}" for name, (_, text) in CONTROLS.items())
BASELINE_OPTIONS = ("kl_clip", "statistics_every", "inverse_every")


def option(default: Any, text: str) -> Any:
    """Return a dataclass field with a default value and a help text."""
    return field(default=default, metadata={"help": text})


def _fngd_help(name: str) -> dict[str, str]:
    """Describe an option that overrides a key of FNGDConfig, which also checks its value."""
    keys = {f.name: f for f in dataclasses.fields(FNGDConfig)}
    users = ["fngd", *(baseline for baseline in BASELINES if name in BASELINES[baseline].options)]
    return {
        "help": f"{', '.join(users)}: {keys[name].metadata['help']} Default: the configuration's, or the baseline's."
    }


def _baseline_option(name: str, text: str) -> Any:
    users = ", ".join(baseline for baseline in BASELINES if name in BASELINES[baseline].options)
    return option(None, f"{users}: {text} Default: the baseline's.")


@dataclass
class OptimizerArguments:
    """Which optimizer, and what of its configuration to override.

    Learning rate, weight decay, warm-up and scheduler are TrainingArguments', and so are AdamW's betas.
    """

    optimizer: Literal["fngd", "ngd", "adamw", "sgd", "muon", "soap", "shampoo", "kfac", "eva"] = option(
        "fngd", "The optimizer. ngd is fngd with sharing 'never'; those behind sgd update what fngd preconditions."
    )
    momentum: float | None = option(
        None, "Momentum of fngd (default: its configuration's), of sgd (default: 0.9), or of a baseline that has one."
    )
    fngd_config: str | None = option(
        None,
        f"fngd: a preset ({', '.join(PRESETS)}), a Hub repository or a local folder; by default 'default'.",
    )
    damping: float | None = field(default=None, metadata=_fngd_help("damping"))
    sharing: str | None = field(default=None, metadata=_fngd_help("sharing"))
    refresh: int | None = field(default=None, metadata=_fngd_help("refresh"))
    coefficient_steps: int | None = field(default=None, metadata=_fngd_help("coefficient_steps"))
    step_scale: str | None = field(default=None, metadata=_fngd_help("step_scale"))
    update: str | None = field(default=None, metadata=_fngd_help("update"))
    fallback: str | None = field(default=None, metadata=_fngd_help("fallback"))
    fallback_lr: float | None = field(default=None, metadata=_fngd_help("fallback_lr"))
    beta2: float | None = field(default=None, metadata=_fngd_help("beta2"))
    eps: float | None = field(default=None, metadata=_fngd_help("eps"))
    memory_budget: int | None = field(default=None, metadata=_fngd_help("memory_budget"))
    target_modules: list[str] | None = field(default=None, metadata=_fngd_help("target_modules"))
    exclude_modules: list[str] | None = field(default=None, metadata=_fngd_help("exclude_modules"))
    weigh_rest: bool | None = field(default=None, metadata=_fngd_help("weigh_rest"))
    strict: bool | None = field(default=None, metadata=_fngd_help("strict"))
    control: str | None = field(
        default=None,
        metadata={"help": f"fngd: a control experiment, with other weights. {_controls}.", "choices": [*CONTROLS]},
    )
    kl_clip: float | None = _baseline_option("kl_clip", "Bound of the trust region.")
    statistics_every: int | None = _baseline_option("statistics_every", "Steps between two statistics.")
    inverse_every: int | None = _baseline_option("inverse_every", "Steps between two inverses, roots or eigenbases.")

    def __post_init__(self) -> None:
        """Reject options that the optimizer would ignore."""
        used = {"sgd": ["momentum"], "adamw": []}
        if self.uses_fngd:
            useful = [name for name in _names_of(self) if name not in BASELINE_OPTIONS]
        else:
            useful = used[self.optimizer] if self.optimizer in used else list(BASELINES[self.optimizer].options)
        ignored = [name for name in self._given() if name not in useful]
        if ignored:
            raise ValueError(
                f"--optimizer {self.optimizer} has no use for {', '.join(f'--{name}' for name in ignored)}: "
                f"leave out what only others use; it takes {', '.join(useful) or 'none of these options'}."
            )
        if self.control is not None and self.control not in CONTROLS:
            raise ValueError(f"--control {self.control} does not exist; there are {', '.join(CONTROLS)}.")
        if self.optimizer == "ngd" and self.sharing not in (None, "never"):
            raise ValueError(f"--optimizer ngd is fngd with --sharing never, not {self.sharing}.")

    @property
    def uses_fngd(self) -> bool:
        """Whether the optimizer is FNGD, under either of its names."""
        return self.optimizer in ("fngd", "ngd")

    def baseline_options(self) -> dict[str, Any]:
        """Return the options of the baseline that were given a value."""
        return {name: getattr(self, name) for name in self._given()}

    def _given(self) -> list[str]:
        return [name for name in _names_of(self) if getattr(self, name) is not None]

    def overrides(self) -> dict[str, Any]:
        """Return the keys of FNGDConfig that were given a value, with PEFT's convention for lists of one."""
        values = {name: getattr(self, name) for name in self._given() if name not in NOT_IN_CONFIG}
        if self.optimizer == "ngd":
            values["sharing"] = "never"
        for name in ("target_modules", "exclude_modules"):
            if len(values.get(name, ())) == 1:
                values[name] = values[name][0]
        return values


def check_training_arguments(args: TrainingArguments) -> None:
    """Reject what the recipes have other options for, and keep a DataLoader without a device quiet.

    Raises:
        ValueError: do_train is off, or optim names an optimizer.
    """
    if not torch.accelerator.is_available():
        args.dataloader_pin_memory = False  # on a CPU alone the DataLoader warns of it in every epoch
    if not args.do_train:
        raise ValueError(
            "This recipe always trains. To evaluate a finished run again, start it with the same output_dir "
            "and without --overwrite_output_dir: it resumes behind the last step."
        )
    if not args.optim.startswith("adamw_torch"):
        raise ValueError(f"Set --optimizer instead of --optim {args.optim.value}.")


@dataclass
class TextTrainingArguments(TrainingArguments):
    """TrainingArguments with the defaults of the recipes on text."""

    do_train: bool = option(True, "Always on: a finished run is evaluated again by resuming it.")
    do_eval: bool = option(True, "Score the validation split at the end.")
    do_predict: bool = option(True, "Score the test split at the end.")
    learning_rate: float = option(1e-3, "Peak learning rate.")
    per_device_train_batch_size: int = option(64, "Rows in a training batch, on each device.")
    per_device_eval_batch_size: int = option(128, "Rows in an evaluation batch, on each device.")
    eval_strategy: str = option("epoch", "When to measure the validation loss.")
    logging_strategy: str = option("epoch", "When to log the training loss.")
    save_strategy: str = option("epoch", "When to write a checkpoint.")
    save_total_limit: int | None = option(1, "Checkpoints to keep.")
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "Sampler of the training batches; 'group_by_length' saves most of the padding.",
            "choices": ["random", "sequential", "group_by_length", "batch_rebalance"],
        },
    )
    ddp_find_unused_parameters: bool | None = option(False, "Off: every parameter takes part in every step.")
    remove_unused_columns: bool = option(
        False, "Off, so that the index column of `--sharing index` reaches the optimizer."
    )

    def __post_init__(self) -> None:
        """Reject what the recipes have another option for; the rest is checked by the Trainer."""
        super().__post_init__()
        check_training_arguments(self)


def parse(classes: Sequence[type], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Parse the command line, over the values of the file that `--config` names.

    Args:
        classes: Dataclasses of options.
        argv: The arguments behind the program's name; `sys.argv[1:]` where None.

    Returns:
        One instance of each dataclass.

    Raises:
        ValueError: An option or a key of the file does not exist (with the names that come close), or a value
            is out of range. A value of the wrong type ends the program with argparse's message.
    """
    # No abbreviations: a prefix that is unique today names another option tomorrow.
    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config", type=Path)
    known, rest = config_parser.parse_known_args(argv)
    parser = HfArgumentParser(classes, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file of options, one `name: value` a line; the command line wins.")
    names = [f.name for cls in classes for f in dataclasses.fields(cls) if f.init]
    from_file = [] if known.config is None else _as_options(known.config, names)
    *parsed, _, unknown = parser.parse_args_into_dataclasses(
        [*from_file, *rest], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(
            _unknown("command line", [word for word in unknown if word.startswith("--")] or unknown, names)
        )
    return tuple(parsed)


def _as_options(path: Path, names: Sequence[str]) -> list[str]:
    """Return the file's values as command line words, so that one parser gives every value its type."""
    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; it must hold one `name: value` a line.")
    unknown = [str(key) for key in values if key not in names]
    if unknown:
        raise ValueError(_unknown(str(path), unknown, names))
    return words(values)


def _names_of(optimizer_args: OptimizerArguments) -> list[str]:
    return [f.name for f in dataclasses.fields(optimizer_args) if f.name != "optimizer"]


def _unknown(where: str, words: Iterable[str], names: Sequence[str]) -> str:
    """Describe names that do not exist, each with those that come close."""
    lines = []
    for word in words:
        close = difflib.get_close_matches(word.lstrip("-").split("=")[0].replace("-", "_"), names)
        lines.append(f"{word}" + (f" (did you mean {' or '.join(close)}?)" if close else ""))
    return f"Unknown options in {where}: {', '.join(lines)}. `--help` lists all."


def at_least_one(arguments: Any, name: str) -> None:
    """Raise a ValueError where the option of that name is below 1."""
    if getattr(arguments, name) < 1:
        raise ValueError(f"{name} is {getattr(arguments, name)}; it must be at least 1.")
