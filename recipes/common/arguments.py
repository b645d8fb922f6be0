"""What the command lines of the recipes share: the optimizer's options, and defaults, then a YAML file, then words."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from baselines import BASELINES
from common.command_line import words
from hf_fngd.config import PRESETS, FNGDConfig

_OPTIONS = {"adamw": [], "sgd": ["momentum"]}
_OPTIONS |= {name: [*BASELINES[name].options, "fallback_lr"] for name in BASELINES}
"""The options of the optimizers beside FNGD; learning rate and weight decay are TrainingArguments'."""
# Groups of parameters are no words: they belong into a configuration's file.
_KEYS = {f.name: f for f in dataclasses.fields(FNGDConfig) if f.name not in ("lr", "weight_decay", "param_groups")}
_TYPES = {name: hint for name, hint in typing.get_type_hints(FNGDConfig).items() if name in _KEYS}


def option(default: Any, text: str, **more: Any) -> Any:
    """Return a dataclass field with a default value, a help text, and what else argparse is to know of it."""
    return field(default=default, metadata={"help": text, **more})


def _described(name: str, text: str, *users: str) -> Any:
    """Return the field of an option that may be left out, with all optimizers that use it in its help text."""
    users = (*users, *(optimizer for optimizer in _OPTIONS if name in _OPTIONS[optimizer]))
    return option(None, f"{', '.join(users)}: {text} Default: the configuration's, or the optimizer's own.")


def _alternatives(name: str) -> list[Any]:
    """Return the types that a key of FNGDConfig may have, None aside."""
    hint = _TYPES[name]
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return [kind for kind in (typing.get_args(hint) if union else (hint,)) if kind is not types.NoneType]


def _option_type(name: str) -> Any:
    """Return the type of the option that overrides a key of FNGDConfig: lists of names are given as words."""
    kinds = _alternatives(name)
    several = any(
        isinstance(origin := typing.get_origin(kind), type) and issubclass(origin, Sequence) for kind in kinds
    )
    return (list[str] if several else kinds[0]) | None


FNGDOptions = dataclasses.make_dataclass(
    "FNGDOptions",
    [(name, _option_type(name), _described(name, key.metadata["help"], "fngd")) for name, key in _KEYS.items()],
)
FNGDOptions.__doc__ = """The keys of FNGDConfig, which also checks their values, as options that may be left out."""


@dataclass
class OptimizerArguments(FNGDOptions):  # type: ignore[misc, valid-type]
    """Which optimizer, and what of its configuration to override.

    Learning rate, weight decay, warm-up and scheduler are TrainingArguments', and so are AdamW's betas.
    """

    optimizer: Literal["fngd", "ngd", "adamw", "sgd", "muon", "soap", "shampoo", "kfac", "kfac_eigen", "eva"] = option(
        "fngd", "The optimizer. ngd is fngd with sharing 'never'; those behind sgd update what fngd preconditions."
    )
    fngd_config: str | None = option(
        None,
        f"fngd: a preset ({', '.join(PRESETS)}), a Hub repository or a local folder; by default 'default'.",
    )
    kl_clip: float | None = _described("kl_clip", "Bound of the trust region.")
    statistics_every: int | None = _described("statistics_every", "Steps between two statistics.")
    inverse_every: int | None = _described("inverse_every", "Steps between two inverses, roots or eigenbases.")

    def __post_init__(self) -> None:
        """Reject options that the optimizer would ignore."""
        useful = [*_KEYS, "fngd_config"] if self.uses_fngd else _OPTIONS[self.optimizer]
        ignored = [name for name in self.given() if name not in useful]
        if ignored:
            raise ValueError(
                f"--optimizer {self.optimizer} has no use for {', '.join(f'--{name}' for name in ignored)}: "
                f"leave out what only others use; it takes {', '.join(useful) or 'none of these options'}."
            )
        if self.optimizer == "ngd" and self.sharing not in (None, "never"):
            raise ValueError(f"--optimizer ngd is fngd with --sharing never, not {self.sharing}.")

    @property
    def uses_fngd(self) -> bool:
        """Whether the optimizer is FNGD, under either of its names."""
        return self.optimizer in ("fngd", "ngd")

    def given(self) -> dict[str, Any]:
        """Return the options of the optimizer that were given a value."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "optimizer"}
        return {name: value for name, value in values.items() if value is not None}

    def overrides(self) -> dict[str, Any]:
        """Return the keys of FNGDConfig that were given a value, with PEFT's convention for lists of one."""
        values = {name: value for name, value in self.given().items() if name in _KEYS}
        if self.optimizer == "ngd":
            values["sharing"] = "never"
        for name, value in values.items():
            if isinstance(value, list) and len(value) == 1 and str in _alternatives(name):
                values[name] = value[0]
        return values


@dataclass
class DatasetArguments:
    """Which data, and whether to start anew."""

    dataset_name: str | None = option(None, "Hub id or local folder of the dataset. Default: data of the recipe's own.")
    dataset_config_name: str | None = option(None, "Configuration of the dataset, where it has several.")
    overwrite_output_dir: bool = option(
        False, "Start anew: delete the checkpoints in output_dir, and replace its results."
    )


@dataclass
class RecipeTrainingArguments(TrainingArguments):
    """TrainingArguments with the defaults of all recipes; that of output_dir is the recipe's own."""

    do_train: bool = option(True, "Always on: a finished run is evaluated again by resuming it.")
    learning_rate: float = option(1e-3, "Peak learning rate.")
    eval_strategy: str = option("epoch", "When to evaluate.")
    logging_strategy: str = option("epoch", "When to log the training loss.")
    save_total_limit: int | None = option(1, "Checkpoints to keep.")

    given: ClassVar[frozenset[str] | None] = None  # the options that somebody set, where `parse` knows

    @property
    def seed_of_data(self) -> int:
        """The seed of the order, and of the choice, of training rows."""
        return self.seed if self.data_seed is None else self.data_seed

    def __post_init__(self) -> None:
        """Reject what the recipes have other options for, and keep a DataLoader without a device quiet.

        The rest is checked by the Trainer.

        Raises:
            ValueError: do_train is off, or optim names an optimizer.
        """
        do_eval = self.do_eval
        super().__post_init__()
        self.do_eval = do_eval  # Trainer turns it on where it evaluates in training; here it is about the end
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # on a CPU alone the DataLoader warns of it in every epoch
        if not self.do_train:
            raise ValueError(
                "This recipe always trains. To evaluate a finished run again, start it with the same output_dir "
                "and without --overwrite_output_dir: it resumes behind the last step."
            )
        if not self.optim.startswith("adamw_torch"):
            raise ValueError(f"Set --optimizer instead of --optim {self.optim.value}.")


@dataclass
class TextTrainingArguments(RecipeTrainingArguments):
    """TrainingArguments with the defaults of the recipes on text."""

    do_eval: bool = option(True, "Score the validation split at the end.")
    do_predict: bool = option(True, "Score the test split at the end.")
    per_device_train_batch_size: int = option(64, "Rows in a training batch, on each device.")
    per_device_eval_batch_size: int = option(128, "Rows in an evaluation batch, on each device.")
    save_strategy: str = option("epoch", "When to write a checkpoint.")
    train_sampling_strategy: str = option(
        "group_by_length",
        "Sampler of the training batches; 'group_by_length' saves most of the padding.",
        choices=["random", "sequential", "group_by_length", "batch_rebalance"],
    )
    ddp_find_unused_parameters: bool | None = option(False, "Off: every parameter takes part in every step.")
    average_checkpoints: int = option(
        1, "In the end the model is the mean of its last so many checkpoints; 1: it stays as it was trained."
    )

    def __post_init__(self) -> None:
        """Reject averages of checkpoints that are not kept; the rest as `RecipeTrainingArguments`."""
        super().__post_init__()
        at_least_one(self, "average_checkpoints")
        if self.average_checkpoints == 1:
            return
        if self.save_strategy not in ("epoch", "steps") or self.load_best_model_at_end:
            raise ValueError(
                f"average_checkpoints={self.average_checkpoints} takes checkpoints, and not the best one: set "
                "--save_strategy epoch or steps, and leave out --load_best_model_at_end."
            )
        needed = self.average_checkpoints + (self.metric_for_best_model is not None)  # the best one is kept beside
        if self.save_total_limit is not None and 0 < self.save_total_limit < needed:
            raise ValueError(
                f"average_checkpoints={self.average_checkpoints} needs --save_total_limit {needed} or more; it is "
                f"{self.save_total_limit}."
            )


def parse(classes: Sequence[type], argv: Sequence[str] | None = None, **defaults: Any) -> tuple[Any, ...]:
    """Parse the command line, over the values of the file that `--config` names.

    Args:
        classes: Dataclasses of options.
        argv: The arguments behind the program's name; `sys.argv[1:]` where None.
        **defaults: What replaces the default values of options.

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
    parser.set_defaults(**defaults)
    parser.add_argument("--config", help="YAML file of options, one `name: value` a line; the command line wins.")
    names = [f.name for cls in classes for f in dataclasses.fields(cls) if f.init]
    from_file = [] if known.config is None else _as_options(known.config, names)
    *parsed, _, unknown = parser.parse_args_into_dataclasses(
        [*from_file, *rest], return_remaining_strings=True, look_for_args_file=False
    )
    given = {word[2:].partition("=")[0] for word in [*from_file, *rest] if word.startswith("--")}
    for group in parsed:
        if isinstance(group, RecipeTrainingArguments):
            group.given = frozenset(given)
    if unknown:
        if files := [word for word in unknown if word.endswith((".yaml", ".yml"))]:
            raise ValueError(f"A file of options is named by --config: --config {files[0]}.")
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


def _unknown(where: str, words: Iterable[str], names: Sequence[str]) -> str:
    """Describe names that do not exist, each with those that come close."""
    lines = []
    for word in words:
        close = difflib.get_close_matches(word.lstrip("-").split("=")[0].replace("-", "_"), names)
        lines.append(f"{word}" + (f" (did you mean {' or '.join(close)}?)" if close else ""))
    return f"Unknown options in {where}: {', '.join(lines)}. `--help` lists all."


def at_least_one(arguments: Any, *names: str) -> None:
    """Raise a ValueError where an option of these names is below 1; None is none."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")


def check_model_size(arguments: Any, heads: str | None = None, width: str | None = None) -> None:
    """Raise a ValueError where the dropout is out of range, or the number of heads does not divide the width."""
    if not 0 <= arguments.dropout < 1:
        raise ValueError(f"dropout is {arguments.dropout}; it must lie in [0, 1).")
    if heads is not None and width is not None and getattr(arguments, width) % getattr(arguments, heads):
        raise ValueError(f"{heads}={getattr(arguments, heads)} does not divide {width}={getattr(arguments, width)}.")
