"""Parameter groups: who is updated by which rule, and who is decayed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from hf_fngd.selection import Selected

# Trainer's own rule for parameters without weight decay (transformers' `get_decay_parameter_names`).
_NO_DECAY_NAME = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def decays(model: nn.Module) -> set[str]:
    """The names of the parameters that weight decay applies to: no biases and no norms."""
    names = set()
    for prefix, module in model.named_modules():
        for leaf, _ in module.named_parameters(recurse=False):
            name = f"{prefix}.{leaf}" if prefix else leaf
            if not isinstance(module, nn.LayerNorm) and not _NO_DECAY_NAME.search(name.lower()):
                names.add(name)
    return names


def parameter_groups(
    model: nn.Module,
    layers: Sequence[Selected],
    *,
    lr: float,
    weight_decay: float,
    update: str,
    fallback: str,
    fallback_lr: float,
) -> list[dict[str, Any]]:
    """Split the trainable parameters, the preconditioned ones first.

    Every group carries ``rule`` (a key of `hf_fngd.rules.RULES`) and ``layers``: for each of its parameters
    the number of its preconditioned layer, or an empty list in the groups of the fallback. Biases of
    preconditioned layers are vectors, which "muon" cannot orthogonalize: they get "adam" then.

    Args:
        model: the whole model.
        layers: the preconditioned layers, in order.
        lr: learning rate of the preconditioned groups.
        weight_decay: decay of the groups that decay.
        update: rule of the preconditioned groups.
        fallback: rule of the others.
        fallback_lr: learning rate of the others.

    Returns:
        The groups that have parameters; ``params`` holds pairs of name and parameter, as torch takes them.
    """
    decayed = decays(model)
    matrices: dict[str, Any] = _group("preconditioned", update, lr, weight_decay)
    vectors = _group("preconditioned_no_decay", "adam" if update == "muon" else update, lr, 0.0)
    rest = _group("plain", fallback, fallback_lr, weight_decay)
    rest_no_decay = _group("plain_no_decay", fallback, fallback_lr, 0.0)
    place = {id(p): i for i, layer in enumerate(layers) for p in layer.module.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = place.get(id(parameter))
        if layer is None:
            (rest if name in decayed else rest_no_decay)["params"].append((name, parameter))
        else:
            group = matrices if parameter.dim() > 1 else vectors
            group["params"].append((name, parameter))
            group["layers"].append(layer)
    return [group for group in (matrices, vectors, rest, rest_no_decay) if group["params"]]


def _group(name: str, rule: str, lr: float, weight_decay: float) -> dict[str, Any]:
    return {"params": [], "name": name, "rule": rule, "lr": lr, "weight_decay": weight_decay, "layers": []}
