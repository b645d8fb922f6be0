"""Options of the translation recipe: defaults, then a YAML file, then the command line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from transformers import HfArgumentParser, Seq2SeqTrainingArguments

from baselines import BASELINES
from hf_fngd.config import PRESETS, FNGDConfig


def _option(default: Any, text: str) -> Any:
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
    return _option(None, f"{users}: {text} Default: the baseline's.")


@dataclass
class DataArguments:
    """What to translate, and how much of it."""

    dataset_name: str | None = _option(
        None, "Hub id or local folder with train, validation and test splits. Default: the embedded corpus."
    )
    dataset_config_name: str | None = _option(None, "Configuration of the dataset, where it has several.")
    source_lang: str = _option("en", "Language to translate from: a column, or a key of the column 'translation'.")
    target_lang: str = _option("de", "Language to translate into: a column, or a key of the column 'translation'.")
    max_train_samples: int | None = _option(None, "Use only the first so many training pairs.")
    max_eval_samples: int | None = _option(None, "Use only the first so many validation pairs.")
    max_predict_samples: int | None = _option(None, "Use only the first so many test pairs.")
    max_source_length: int = _option(128, "Longer sources are cut to so many tokens.")
    max_target_length: int = _option(128, "Longer targets are cut, and generation stops, at so many tokens.")
    num_beams: int = _option(1, "Beams of the generation; 1 is greedy.")
    preprocessing_num_workers: int | None = _option(None, "Processes that tokenize the dataset.")
    overwrite_output_dir: bool = _option(
        False, "Start anew: delete the checkpoints in output_dir instead of resuming from the last one."
    )

    def __post_init__(self) -> None:
        """Reject values that no run can use."""
        if self.source_lang == self.target_lang:
            raise ValueError(f"source_lang and target_lang are both {self.source_lang!r}; name two languages.")
        for name in ("max_source_length", "max_target_length", "num_beams"):
            _at_least_one(self, name)
        for name in (
            "max_train_samples",
            "max_eval_samples",
            "max_predict_samples",
            "preprocessing_num_workers",
        ):
            if getattr(self, name) is not None:
                _at_least_one(self, name)


@dataclass
class ModelArguments:
    """Size of the Transformer; the defaults are the base model of Vaswani et al. (2017)."""

    d_model: int = _option(512, "Width of embeddings and hidden states.")
    encoder_layers: int = _option(6, "Encoder layers.")
    decoder_layers: int = _option(6, "Decoder layers.")
    ffn_dim: int = _option(2048, "Inner width of the feed-forward layers.")
    num_heads: int = _option(8, "Attention heads; they divide d_model.")
    dropout: float = _option(0.1, "Dropout on embeddings and on each sublayer's output.")
    vocab_size: int = _option(8000, "Size of the vocabulary shared by both languages, an upper bound.")

    def __post_init__(self) -> None:
        """Reject sizes that do not fit together."""
        for name in ("d_model", "encoder_layers", "decoder_layers", "ffn_dim", "num_heads"):
            _at_least_one(self, name)
        if self.d_model % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide d_model={self.d_model}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must lie in [0, 1).")


@dataclass
class OptimizerArguments:
    """Which optimizer, and what of its configuration to override.

    Learning rate, weight decay, warm-up and scheduler are TrainingArguments', and so are AdamW's betas.
    """

    optimizer: Literal["fngd", "ngd", "adamw", "sgd", "muon", "soap", "shampoo", "kfac", "eva"] = _option(
        "fngd", "The optimizer. ngd is fngd with sharing 'never'; those behind sgd update what fngd preconditions."
    )
    momentum: float | None = _option(
        None, "Momentum of fngd (default: its configuration's), of sgd (default: 0.9), or of a baseline that has one."
    )
    fngd_config: str | None = _option(
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
    strict: bool | None = field(default=None, metadata=_fngd_help("strict"))
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
        values = {name: getattr(self, name) for name in self._given() if name != "fngd_config"}
        if self.optimizer == "ngd":
            values["sharing"] = "never"
        for name in ("target_modules", "exclude_modules"):
            if len(values.get(name, ())) == 1:
                values[name] = values[name][0]
        return values


@dataclass
class TranslationTrainingArguments(Seq2SeqTrainingArguments):
    """Seq2SeqTrainingArguments with the defaults of a translation model that is trained from scratch."""

    output_dir: str = _option("outputs/translation", "Folder of the model, its card, plots and results.")
    do_train: bool = _option(True, "Always on: a finished run is evaluated again by resuming it.")
    do_eval: bool = _option(True, "Translate and score the validation split at the end.")
    do_predict: bool = _option(True, "Translate and score the test split at the end.")
    learning_rate: float = _option(1e-3, "Peak learning rate.")
    label_smoothing_factor: float = _option(0.1, "Label smoothing, as in Vaswani et al. (2017).")
    per_device_train_batch_size: int = _option(64, "Sentence pairs in a training batch, on each device.")
    per_device_eval_batch_size: int = _option(128, "Sentence pairs in an evaluation batch, on each device.")
    eval_strategy: str = _option("epoch", "When to measure the validation loss.")
    logging_strategy: str = _option("epoch", "When to log the training loss.")
    save_strategy: str = _option("epoch", "When to write a checkpoint.")
    save_total_limit: int | None = _option(1, "Checkpoints to keep.")
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "Sampler of the training batches; 'group_by_length' saves most of the padding.",
            "choices": ["random", "sequential", "group_by_length", "batch_rebalance"],
        },
    )
    ddp_find_unused_parameters: bool | None = _option(False, "Off: every parameter takes part in every step.")
    remove_unused_columns: bool = _option(
        False, "Off, so that the index column of `--sharing index` reaches the optimizer."
    )

    def __post_init__(self) -> None:
        """Reject what this recipe has another option for; the rest is checked by the Trainer."""
        super().__post_init__()
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # on a CPU alone the DataLoader warns of it in every epoch
        if not self.do_train:
            raise ValueError(
                "This recipe always trains. To evaluate a finished run again, start it with the same output_dir "
                "and without --overwrite_output_dir: it resumes behind the last step."
            )
        for name, ours in (("generation_num_beams", "num_beams"), ("generation_max_length", "max_target_length")):
            if getattr(self, name) is not None:
                raise ValueError(f"Set --{ours} instead of --{name}: it is saved with the model.")
        if not self.optim.startswith("adamw_torch"):
            raise ValueError(f"Set --optimizer instead of --optim {self.optim.value}.")


# What FNGDConfig does not have.
BASELINE_OPTIONS = ("kl_clip", "statistics_every", "inverse_every")
DATACLASSES = (DataArguments, ModelArguments, OptimizerArguments, TranslationTrainingArguments)


def parse_arguments(
    argv: Sequence[str] | None = None,
) -> tuple[DataArguments, ModelArguments, OptimizerArguments, TranslationTrainingArguments]:
    """Parse the command line, over the values of the file that `--config` names.

    Args:
        argv: The arguments behind the program's name; `sys.argv[1:]` where None.

    Returns:
        One instance of each dataclass of `DATACLASSES`.

    Raises:
        ValueError: An option or a key of the file does not exist (with the names that come close), or a value
            is out of range. A value of the wrong type ends the program with argparse's message.
    """
    # No abbreviations: a prefix that is unique today names another option tomorrow.
    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config", type=Path)
    known, rest = config_parser.parse_known_args(argv)
    parser = HfArgumentParser(DATACLASSES, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file of options, one `name: value` a line; the command line wins.")
    from_file = [] if known.config is None else _as_options(known.config)
    data, model, optimizer, training, _, unknown = parser.parse_args_into_dataclasses(
        [*from_file, *rest], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(_unknown("command line", [word for word in unknown if word.startswith("--")] or unknown))
    return data, model, optimizer, training


def _as_options(path: Path) -> list[str]:
    """Return the file's values as command line words, so that one parser gives every value its type."""
    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; it must hold one `name: value` a line.")
    unknown = [str(key) for key in values if key not in _names()]
    if unknown:
        raise ValueError(_unknown(str(path), unknown))
    words: list[str] = []
    for key, value in values.items():
        if isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        elif isinstance(value, dict):
            words.append(f"--{key}={json.dumps(value)}")
        elif value is not None:
            words.append(f"--{key}={value}")
    return words


def _names_of(optimizer_args: OptimizerArguments) -> list[str]:
    return [f.name for f in dataclasses.fields(optimizer_args) if f.name != "optimizer"]


def _names() -> list[str]:
    return [f.name for cls in DATACLASSES for f in dataclasses.fields(cls) if f.init]


def _unknown(where: str, words: Iterable[str]) -> str:
    """Describe names that do not exist, each with those that come close."""
    lines = []
    for word in words:
        close = difflib.get_close_matches(word.lstrip("-").split("=")[0].replace("-", "_"), _names())
        lines.append(f"{word}" + (f" (did you mean {' or '.join(close)}?)" if close else ""))
    return f"Unknown options in {where}: {', '.join(lines)}. `--help` lists all."


def _at_least_one(arguments: Any, name: str) -> None:
    if getattr(arguments, name) < 1:
        raise ValueError(f"{name} is {getattr(arguments, name)}; it must be at least 1.")
