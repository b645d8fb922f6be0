"""The three optimizers of the recipe, as the Trainer takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback

from hf_fngd import FNGDCallback, FNGDConfig, FNGDFactory
from translation.arguments import OptimizerArguments, TranslationTrainingArguments


def fngd_config(arguments: OptimizerArguments, training_args: TranslationTrainingArguments) -> FNGDConfig | None:
    """Load the configuration that was named and apply the options; None unless the optimizer is fngd."""
    if arguments.optimizer != "fngd":
        return None
    return FNGDConfig.load(
        arguments.fngd_config or "default",
        lr=training_args.learning_rate,
        weight_decay=training_args.weight_decay,
        **arguments.overrides(),
    )


def optimizer_cls_and_kwargs(
    arguments: OptimizerArguments, config: FNGDConfig | None, training_args: TranslationTrainingArguments
) -> tuple[Any, dict[str, Any]] | None:
    """Return what `Trainer(optimizer_cls_and_kwargs=...)` takes; None leaves it to `--optim`, an AdamW.

    Raises:
        ValueError: `--optim` names an optimizer that `--optimizer` contradicts.
    """
    if not training_args.optim.startswith("adamw_torch"):
        raise ValueError(f"--optim {training_args.optim} is not used by this recipe; leave it out and set --optimizer.")
    if config is not None:
        return FNGDFactory, {"args": training_args, "config": config}
    if arguments.optimizer == "sgd":
        momentum = 0.9 if arguments.momentum is None else arguments.momentum
        return torch.optim.SGD, {"lr": training_args.learning_rate, "momentum": momentum}
    return None


def callbacks(config: FNGDConfig | None) -> list[TrainerCallback]:
    """Return the callbacks that the optimizer wants."""
    return [] if config is None else [FNGDCallback()]


def describe(optimizer: torch.optim.Optimizer, config: FNGDConfig | None) -> dict[str, Any]:
    """Return the name and the arguments of the optimizer that trained, not of the one that was asked for.

    Args:
        optimizer: The optimizer, in accelerate's wrapper or not.
        config: FNGD's configuration, whose keys are its arguments.

    Returns:
        `optimizer`, the class's name, and `optimizer_arguments`, in types that JSON knows: FNGD's configuration, any
        other optimizer's options in its first group (that of the parameters with weight decay).
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if config is not None:
        arguments: Mapping[str, Any] = config.optimizer_arguments()
    else:
        group = optimizer.param_groups[0]
        options = {key: group[key] for key in group if key not in ("params", "initial_lr")}
        # The scheduler has moved lr by now; the peak is what was set.
        arguments = options | {"lr": group.get("initial_lr", group["lr"])}
    return {"optimizer": type(optimizer).__name__, "optimizer_arguments": dict(arguments)}
