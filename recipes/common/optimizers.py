"""The optimizers of the recipes, as the Trainer takes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainingArguments

from baselines import BASELINES, BaselineFactory
from common.arguments import OptimizerArguments
from hf_fngd import FNGD, FNGDConfig, FNGDFactory
from hf_fngd.config import PRESETS

_NO_OPTIONS = ("params", "initial_lr", "step", "steps")  # keys of a parameter group


def fngd_config(arguments: OptimizerArguments, training_args: TrainingArguments) -> FNGDConfig | None:
    """Load the configuration that was named and apply the options; None unless the optimizer is FNGD.

    Learning rate and weight decay are those of the configuration where it is no preset, and nobody set them in
    TrainingArguments.

    Raises:
        ValueError: Two options of different values mean the same, such as --momentum and --adam_beta1.
    """
    if not arguments.uses_fngd:
        return None
    name = arguments.fngd_config or "default"
    defaults = {f.name: f.default for f in dataclasses.fields(training_args)}
    given = getattr(training_args, "given", None)
    if given is None:
        given = {name for name, default in defaults.items() if getattr(training_args, name) != default}
    overrides = arguments.overrides()
    for own, theirs in (("momentum", "adam_beta1"), ("beta2", "adam_beta2"), ("eps", "adam_epsilon")):
        value = getattr(training_args, theirs)
        if own in overrides and theirs in given and overrides[own] != value:
            raise ValueError(f"--{own} is {overrides[own]:g} and --{theirs} is {value:g}: leave out one of them.")
    rates = {
        key: getattr(training_args, theirs)
        for key, theirs in (("lr", "learning_rate"), ("weight_decay", "weight_decay"))
        if name in PRESETS or theirs in given
    }
    return FNGDConfig.load(name, **rates, **overrides)


def optimizer_cls_and_kwargs(
    arguments: OptimizerArguments, config: FNGDConfig | None, training_args: TrainingArguments
) -> tuple[Any, dict[str, Any]] | None:
    """Return what `Trainer(optimizer_cls_and_kwargs=...)` takes; None leaves it to Trainer, an AdamW."""
    if config is not None:
        return FNGDFactory, {"args": training_args, "config": config}
    if arguments.optimizer == "sgd":
        momentum = 0.9 if arguments.momentum is None else arguments.momentum
        return torch.optim.SGD, {"lr": training_args.learning_rate, "momentum": momentum}
    if arguments.optimizer in BASELINES:
        return BaselineFactory, {
            "name": arguments.optimizer,
            "lr": training_args.learning_rate,
            "weight_decay": training_args.weight_decay,
            "rest_betas": (training_args.adam_beta1, training_args.adam_beta2),
            "rest_eps": training_args.adam_epsilon,
            **arguments.given(),
        }
    return None


def what_trained(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the name and the arguments of the optimizer that trained, not of the one that was asked for.

    Args:
        optimizer: The optimizer, in accelerate's wrapper or not.

    Returns:
        `optimizer`, its name or else its class's, and `optimizer_arguments`, in types that JSON knows: FNGD's
        configuration, any other optimizer's options in its first group (that of the parameters with weight decay).
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if isinstance(optimizer, FNGD):
        arguments: Mapping[str, Any] = optimizer.config.optimizer_arguments()
    else:
        group = optimizer.param_groups[0]
        options = {key: group[key] for key in group if key not in _NO_OPTIONS}
        # The scheduler has moved lr by now; the peak is what was set.
        arguments = options | {"lr": group.get("initial_lr", group["lr"])}
    name = getattr(optimizer, "name", type(optimizer).__name__)
    return {"optimizer": name, "optimizer_arguments": dict(arguments)}
