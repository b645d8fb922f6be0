"""What of a pretrained model is trained: all of it, LoRA adapters or its head; and the learning rate of each layer."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from common.arguments import at_least_one, option
from common.run import Run
from hf_fngd import FNGDFactory
from hf_fngd.updates.groups import decays

ALL_LINEAR = "all-linear"
_NUMBERED = re.compile(r"\.(\d+)\.")  # of a layer, in the name of its parameters


@dataclass
class FineTuningArguments:
    """Which pretrained model, and what of it is trained."""

    model_name_or_path: str | None = option(
        None, "Hub id or local folder of a model and its tokenizer. Default: a new BERT of the sizes below."
    )
    freeze_encoder: bool = option(False, "Train the output layers alone: a linear probe, where there is one of them.")
    lora_r: int | None = option(None, "Train LoRA adapters of this rank, and the output layers. Default: all weights.")
    lora_alpha: int | None = option(None, "LoRA: adapters count alpha / r times. Default: twice lora_r.")
    lora_dropout: float | None = option(None, "LoRA: dropout in front of the adapters. Default: 0.")
    lora_target_modules: list[str] | None = option(  # noqa: RUF009
        None, "LoRA: names of the layers that get adapters. Default: all-linear, every one but the output layers."
    )
    layer_decay: float | None = option(
        None, "adamw, fngd: factor of the learning rate from each layer to the one below, in (0, 1). Default: none."
    )

    def __post_init__(self) -> None:
        """Reject what contradicts itself or would be ignored."""
        given = [f.name for f in dataclasses.fields(FineTuningArguments) if getattr(self, f.name) != f.default]
        if given and self.model_name_or_path is None:
            raise ValueError(f"{', '.join(given)}: options of fine-tuning, which need --model_name_or_path.")
        if self.lora_r is None and (lora := [name for name in given if name.startswith("lora_")]):
            raise ValueError(f"{', '.join(lora)}: options of LoRA, which need --lora_r.")
        if self.freeze_encoder and (self.lora_r is not None or self.layer_decay is not None):
            raise ValueError("--freeze_encoder trains the output layers alone: leave out --lora_r and --layer_decay.")
        at_least_one(self, "lora_r", "lora_alpha")
        if not 0 <= (self.lora_dropout or 0) < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}; it must lie in [0, 1).")
        if self.layer_decay is not None and not 0 < self.layer_decay < 1:
            raise ValueError(f"layer_decay is {self.layer_decay}; it must lie in (0, 1); leave it out for none.")

    def adapt(self, model: PreTrainedModel, new: set[str]) -> tuple[PreTrainedModel | PeftModel, str]:
        """Freeze what is not trained, or wrap the model in LoRA adapters.

        Args:
            model: A pretrained encoder below output layers.
            new: Names of the modules that the checkpoint had no weights for. They are trained like output layers: a
                new pooler, frozen or adapted, would stay at random.

        Returns:
            The model, and what is trained of it in words.
        """
        outputs = {name for name, child in model.named_children() if child is not model.base_model and _has_any(child)}
        trained = sorted(outputs | new)
        if self.freeze_encoder:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(any(name.startswith(f"{module}.") for module in trained))
            return model, f"trained: {', '.join(trained)}; all else was frozen"
        if self.lora_r is None:
            return model, "all weights were trained" + self._decay()
        targets: Any = self.lora_target_modules or [ALL_LINEAR]
        config = LoraConfig(
            task_type="SEQ_CLS",
            r=self.lora_r,
            lora_alpha=self.lora_alpha or 2 * self.lora_r,
            lora_dropout=self.lora_dropout or 0.0,
            target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
            modules_to_save=[*trained],  # PEFT extends the list
        )
        return get_peft_model(model, config), (
            f"trained: LoRA adapters of rank {config.r} (alpha {config.lora_alpha}, dropout {config.lora_dropout:g}) "
            f"on {', '.join(targets)}, and all weights of {', '.join(trained)}{self._decay()}"
        )

    def _decay(self) -> str:
        return "" if self.layer_decay is None else f"; each layer at {self.layer_decay:g} of the rate of the one above"


def _has_any(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def layer_rates(model: nn.Module, decay: float) -> dict[float, list[str]]:
    """Return factors of the learning rate, the largest first, each with the names of the trained parameters it is for.

    It is 1 for what lies outside the encoder or behind its layers, `decay` for the last layer, and so on down to the
    embeddings below the first one: ELECTRA's rule (Clark et al. 2020, arXiv 2003.10555).

    Raises:
        ValueError: The encoder has no numbered layers, or two stacks of them.
    """
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    inside = {id(parameter) for parameter in whole.base_model.parameters()}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in inside]
    number = {name: int(found[1]) for name in names if (found := _NUMBERED.search(name))}
    if not number or whole.config.is_encoder_decoder:
        raise ValueError(f"--layer_decay needs one stack of numbered layers, which {type(whole).__name__} has not.")
    top, first = max(number.values()) + 2, names.index(next(iter(number)))
    # DeBERTa registers the embeddings of relative positions behind its layers.
    below = {name for place, name in enumerate(names) if name not in number and (place < first or "embed" in name)}
    rates: defaultdict[float, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            depth = 0 if name in below else number[name] + 1 if name in number else top
            rates[decay ** (top - depth)].append(name)
    return dict(sorted(rates.items(), reverse=True))


class LayerDecayAdamW:
    """Builds Trainer's AdamW with `layer_rates`, as a factory: Trainer takes "params" out of what it is handed."""

    def __call__(self, model: nn.Module, *, args: TrainingArguments, decay: float) -> torch.optim.Optimizer:
        """Build it on the model that Trainer hands over."""
        optimizer_cls, options = Trainer.get_optimizer_cls_and_kwargs(args)
        parameters, decayed = dict(model.named_parameters()), decays(model)
        groups = []
        for factor, names in layer_rates(model, decay).items():
            for weight_decay, kept in ((args.weight_decay, True), (0.0, False)):
                params = [parameters[name] for name in names if (name in decayed) == kept]
                if params:
                    groups.append({"params": params, "lr": factor * options["lr"], "weight_decay": weight_decay})
        optimizer: torch.optim.Optimizer = optimizer_cls(groups, **options)
        return optimizer


def with_layer_decay(run: Run, model: nn.Module, optimizer: str, decay: float) -> Run:
    """Return the run with an optimizer that has `layer_rates`; raise a ValueError unless it is AdamW or FNGD."""
    if run.config is not None:
        if run.config.fallback_lr is not None:
            raise ValueError("--layer_decay sets the rates of all parameters of a layer: leave out --fallback_lr.")
        if run.config.param_groups is not None:
            raise ValueError("--layer_decay makes parameter groups of its own: take a --fngd_config without any.")
        groups = [
            {"params": _pattern(names), "lr": factor * run.config.lr}
            for factor, names in layer_rates(model, decay).items()
            if factor < 1
        ]
        config = dataclasses.replace(run.config, param_groups=groups)
        return dataclasses.replace(run, config=config, optimizer=(FNGDFactory, {"args": run.args, "config": config}))
    if optimizer != "adamw":
        raise ValueError(f"--optimizer {optimizer} has no use for --layer_decay; adamw and fngd have.")
    return dataclasses.replace(run, optimizer=(LayerDecayAdamW, {"args": run.args, "decay": decay}))


def _pattern(names: list[str]) -> str:
    """Return a regular expression of these parameters; those of a layer by the layer's name."""
    found = [(name, _NUMBERED.search(name)) for name in names]
    parts = (rf"{re.escape(name[: layer.end()])}.*" if layer else re.escape(name) for name, layer in found)
    return "|".join(dict.fromkeys(parts))
