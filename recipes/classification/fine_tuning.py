"""What of a pretrained model is trained: all of it, LoRA adapters or its head; and the learning rate of each layer."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from common.arguments import at_least_one, option
from common.run import Run
from hf_fngd import FNGDFactory
from hf_fngd.updates.groups import decays, with_rate

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
    head_factor: float | None = option(
        None, "adamw, fngd: factor > 0 of the learning rate for the output layers, which are new. Default: none."
    )

    def __post_init__(self) -> None:
        """Reject what contradicts itself or would be ignored."""
        given = [f.name for f in dataclasses.fields(FineTuningArguments) if getattr(self, f.name) != f.default]
        if given and self.model_name_or_path is None:
            raise ValueError(f"{', '.join(given)}: options of fine-tuning, which need --model_name_or_path.")
        if self.lora_r is None and (lora := [name for name in given if name.startswith("lora_")]):
            raise ValueError(f"{', '.join(lora)}: options of LoRA, which need --lora_r.")
        if self.freeze_encoder and (self.lora_r is not None or self.has_own_rates):
            raise ValueError(
                "--freeze_encoder trains the output layers alone: leave out --lora_r, --layer_decay and --head_factor."
            )
        at_least_one(self, "lora_r", "lora_alpha")
        if not 0 <= (self.lora_dropout or 0) < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}; it must lie in [0, 1).")
        if self.layer_decay is not None and not 0 < self.layer_decay < 1:
            raise ValueError(f"layer_decay is {self.layer_decay}; it must lie in (0, 1); leave it out for none.")
        if self.head_factor is not None and not 0 < self.head_factor < math.inf:
            raise ValueError(f"head_factor is {self.head_factor}; it must be above 0; leave it out for none.")

    @property
    def has_own_rates(self) -> bool:
        """Whether parts of the model have learning rates of their own."""
        return self.layer_decay is not None or self.head_factor is not None

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
            return model, "all weights were trained" + self._rates()
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
            f"on {', '.join(targets)}, and all weights of {', '.join(trained)}{self._rates()}"
        )

    def _rates(self) -> str:
        decay = f"; each layer at {self.layer_decay:g} of the rate of the one above" if self.layer_decay else ""
        return decay + (f"; the output layers at {self.head_factor:g} times the rate" if self.head_factor else "")


def _has_any(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def layer_rates(model: nn.Module, decay: float | None = None, head: float | None = None) -> dict[float, list[str]]:
    """Return factors of the learning rate, the largest first, each with the names of the trained parameters it is for.

    It is `head` for what lies outside the encoder and 1 for what lies behind its layers. With a `decay` it is that for
    the last layer, and so on down to the embeddings below the first one: ELECTRA's rule (Clark et al. 2020,
    arXiv 2003.10555).

    Raises:
        ValueError: With a decay: the encoder has no numbered layers, or two stacks of them. With a factor for the head:
            nothing trained lies outside the encoder.
    """
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    inside = {id(parameter) for parameter in whole.base_model.parameters()}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in inside]
    factors = {} if decay is None else _decayed(names, decay)
    if decay is not None and (not factors or whole.config.is_encoder_decoder):
        raise ValueError(f"--layer_decay needs one stack of numbered layers, which {type(whole).__name__} has not.")
    if head is not None and not any(p.requires_grad and id(p) not in inside for p in model.parameters()):
        raise ValueError(
            f"--head_factor is for output layers outside the encoder, which {type(whole).__name__} has not."
        )
    rates: defaultdict[float, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            outside = 1.0 if head is None or id(parameter) in inside else head
            rates[factors.get(name, outside)].append(name)
    return dict(sorted(rates.items(), reverse=True))


def _decayed(names: Sequence[str], decay: float) -> dict[str, float]:
    """Return the factors of numbered layers and of what lies below them, or none where no layer has a number."""
    number = {name: int(found[1]) for name in names if (found := _NUMBERED.search(name))}
    if not number:
        return {}
    top, first = max(number.values()) + 2, names.index(next(iter(number)))
    # DeBERTa registers the embeddings of relative positions behind its layers.
    below = {name for place, name in enumerate(names) if name not in number and (place < first or "embed" in name)}
    return {name: decay ** (top - depth - 1) for name, depth in number.items()} | dict.fromkeys(below, decay**top)


class OwnRatesAdamW:
    """Builds Trainer's AdamW with `layer_rates`, as a factory: Trainer takes "params" out of what it is handed."""

    def __call__(
        self, model: nn.Module, *, args: TrainingArguments, rates: dict[float, list[str]]
    ) -> torch.optim.Optimizer:
        """Build it on the model that Trainer hands over."""
        optimizer_cls, options = Trainer.get_optimizer_cls_and_kwargs(args)
        parameters, decayed = dict(model.named_parameters()), decays(model)
        groups = []
        for factor, names in rates.items():
            for weight_decay, kept in ((args.weight_decay, True), (0.0, False)):
                params = [parameters[name] for name in names if (name in decayed) == kept]
                if params:
                    groups.append({"params": params, "lr": factor * options["lr"], "weight_decay": weight_decay})
        optimizer: torch.optim.Optimizer = optimizer_cls(groups, **options)
        return optimizer


def with_own_rates(run: Run, model: nn.Module, optimizer: str, chosen: FineTuningArguments) -> Run:
    """Return the run with an optimizer that has `layer_rates`; raise a ValueError unless it is AdamW or FNGD."""
    name = "--layer_decay" if chosen.layer_decay else "--head_factor"
    rates = layer_rates(model, chosen.layer_decay, chosen.head_factor)
    if run.config is not None:
        if run.config.fallback_lr is not None:
            raise ValueError(f"{name} sets rates as parts or multiples of --learning_rate: leave out --fallback_lr.")
        if run.config.param_groups is not None:
            raise ValueError(f"{name} makes parameter groups of its own: take a --fngd_config without any.")
        lr = with_rate(run.config, model).lr
        groups = [{"params": _pattern(names), "lr": factor * lr} for factor, names in rates.items() if factor != 1]
        config = dataclasses.replace(run.config, param_groups=groups or None)
        return dataclasses.replace(run, config=config, optimizer=(FNGDFactory, {"args": run.args, "config": config}))
    if optimizer != "adamw":
        raise ValueError(f"--optimizer {optimizer} has no use for {name}; adamw and fngd have.")
    return dataclasses.replace(run, optimizer=(OwnRatesAdamW, {"args": run.args, "rates": rates}))


def _pattern(names: list[str]) -> str:
    """Return a regular expression of these parameters; those of a layer by the layer's name."""
    found = [(name, _NUMBERED.search(name)) for name in names]
    parts = (rf"{re.escape(name[: layer.end()])}.*" if layer else re.escape(name) for name, layer in found)
    return "|".join(dict.fromkeys(parts))
