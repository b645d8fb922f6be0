"""Parameter groups: which rule updates a parameter, and whether it is decayed."""

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from hf_fngd.distributed.sharded import is_sharded
from hf_fngd.layers.base import Matrices, MatrixKernel
from hf_fngd.layers.modules import is_frozen, may_train
from hf_fngd.layers.select import ALL_LINEAR, Selected
from hf_fngd.updates.base import RULES, default_learning_rate
from hf_fngd.updates.chosen import assigned
from hf_fngd.updates.heads import depthwise_filters, output_heads

logger = logging.getLogger(__name__)

# Trainer's own rule for parameters without weight decay (`get_decay_parameter_names`).
_NO_DECAY_NAME = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


_LOADED = ("lr", "weight_decay", "momentum", "beta2", "eps")  # what a loaded state may set


def decays(model: nn.Module) -> set[str]:
    """The names of the parameters that weight decay applies to: all but biases and norms."""
    return {
        name
        for prefix, module in model.named_modules()
        for name, _ in module.named_parameters(prefix, recurse=False)
        if not isinstance(module, nn.LayerNorm) and not _NO_DECAY_NAME.search(name.lower())
    }


def parameter_groups(
    model: nn.Module, layers: Sequence[Selected], unweighed: Mapping[str, Matrices], settings: Any, fallback: str
) -> list[dict[str, Any]]:
    """Split the parameters into groups. Those of the preconditioned layers come first.

    Frozen parameters that may be unfrozen are included, since torch's schedulers accept no group that comes later. The
    user's groups come behind the automatic ones, and are split in the same way.

    In a group ``params`` holds pairs of name and parameter, and ``rule`` is a key of `hf_fngd.updates.RULES`.
    ``layers`` holds the number of each parameter's layer; it is empty for parameters outside the preconditioned layers.
    In the groups of a rule for matrices ``matrices`` says which matrices each parameter consists of.

    A rule for matrices also steps the ``unweighed`` matrices, and leaves to others what is none: biases get "adam",
    depthwise filters the fallback rule. So do output heads, unless the user names them in ``target_modules`` or in a
    group with a rule. Where it moves nothing, a warning is logged.

    Raises:
        ValueError: as `hf_fngd.updates.chosen.assigned`, or a user's group has a rule and no matrix.
    """
    chosen = settings.param_groups or []
    numbers = assigned(model, chosen)
    splits = [_split(settings, fallback)]
    splits += [_split(settings, fallback, group, f"_{number}") for number, group in enumerate(chosen)]
    decayed = decays(model)
    heads = output_heads(model) if settings.target_modules == ALL_LINEAR else set()
    depthwise = depthwise_filters(model)
    # A bias that is trained beside a frozen weight does not count as a preconditioned layer's.
    owners = {
        id(p): number
        for number, layer in enumerate(layers)
        for p in layer.module.parameters(recurse=False)
        if not (p.requires_grad and is_frozen(layer.module))
    }
    for name, parameter in model.named_parameters():
        if not may_train(parameter):
            continue
        number = numbers.get(id(parameter), -1)
        matrices, vectors, others, rest, rest_no_decay = splits[number + 1]
        for_matrices = RULES[matrices["rule"]].matrices
        chosen_rule = number >= 0 and "update" in chosen[number]
        left = id(parameter) in depthwise or (id(parameter) in heads and not chosen_rule)
        if for_matrices and left:
            group = rest if name in decayed else rest_no_decay
        elif id(parameter) in owners:
            group = matrices if parameter.dim() > 1 else vectors
            group["layers"].append(owner := owners[id(parameter)])
            if "matrices" in group:
                kernel = layers[owner].kernel
                assert isinstance(kernel, MatrixKernel)
                group["matrices"].append([*kernel.matrices(parameter)])
        elif name in unweighed and for_matrices:
            group = others
            group["matrices"].append([*unweighed[name]])
        else:
            group = rest if name in decayed else rest_no_decay
        group["params"].append((name, parameter))
    for number, group in enumerate(chosen):
        if "update" in group and not any(split["params"] for split in splits[number + 1][:3:2]):
            raise ValueError(
                f"param_groups[{number}]['update']={group['update']!r} has no effect: none of the group's parameters "
                "is a matrix that this rule steps. Leave it out; exclude_modules gives matrices the fallback rule"
            )
    ordered = [*(group for split in splits for group in split[:2]), *(group for split in splits for group in split[2:])]
    trained = [group for group in ordered if any(p.requires_grad for _, p in group["params"])]
    if RULES[settings.update].matrices and not any("matrices" in group for group in trained):
        logger.warning(
            "update=%r moves nothing here: what is trained are output heads, norms, embeddings, biases, or adapters "
            "that are no matrices (as those of IA3 and prompt tuning). fallback=%r moves all of it",
            settings.update,
            settings.fallback,
        )
    return [group for group in ordered if group["params"]]


def _split(
    settings: Any, fallback: str, own: Mapping[str, Any] = MappingProxyType({}), suffix: str = ""
) -> list[dict[str, Any]]:
    """Empty groups for matrices, vectors, unweighed matrices, and all else with and without decay."""
    lr, rule = own.get("lr", settings.lr), own.get("update", settings.update)
    rest_lr = own.get("lr", settings.lr if settings.fallback_lr is None else settings.fallback_lr)
    decay, no_decay = own.get("weight_decay", settings.weight_decay), own.get("weight_decay", 0.0)
    # The others are the optimizer's defaults.
    reads = {name: settings.effective(name) for name in ("ns_steps", "block_size") if name in RULES[rule].reads}
    for_matrices = RULES[rule].matrices
    preconditioned, unweighed = (
        _group(f"{name}{suffix}", rule, lr, decay) | reads | ({"matrices": []} if for_matrices else {})
        for name in ("preconditioned", "unweighed")
    )
    if reads.get("block_size", 0) is None:
        preconditioned["positions"] = 0  # found in the first step, where layers are weighed
    return [
        preconditioned,
        _group(f"preconditioned_no_decay{suffix}", "adam" if for_matrices else rule, lr, no_decay),
        unweighed,
        _group(f"plain{suffix}", fallback, rest_lr, decay),
        _group(f"plain_no_decay{suffix}", fallback, rest_lr, no_decay),
    ]


def _group(name: str, rule: str, lr: float, weight_decay: float) -> dict[str, Any]:
    return {"params": [], "name": name, "rule": rule, "lr": lr, "weight_decay": weight_decay, "layers": []}


def with_rate(settings: Any, model: nn.Module) -> Any:
    """The settings with the learning rate that None stands for in this model."""
    if settings.lr is not None:
        return settings
    return dataclasses.replace(settings, lr=default_learning_rate(model, settings.update))


def resized(moments: Mapping[str, Tensor], parameter: Tensor, name: str) -> dict[str, Tensor]:
    """The moments of a parameter that gained or lost rows, as by ``resize_token_embeddings``; new rows start at 0.

    Raises RuntimeError where the parameter changed in another way.
    """
    shape = next(iter(moments.values())).shape
    if shape[1:] != parameter.shape[1:] or is_sharded(parameter):
        raise RuntimeError(
            f"{name} has the shape {tuple(parameter.shape)} and had {tuple(shape)} in an earlier step: its moments do "
            "not fit any more. Build FNGD anew after such a change"
        )
    rows = min(shape[0], len(parameter))
    logger.warning(
        "%s had %d rows in an earlier step and has %d: those that stay keep their moments",
        name,
        shape[0],
        len(parameter),
    )
    found = {key: torch.zeros_like(parameter) for key in moments}
    for key, moment in moments.items():
        found[key][:rows] = moment[:rows]
    return found


def trainable(model: nn.Module) -> list[int]:
    """The ``id`` of every trainable parameter; `check_parameters` is needed only where they changed."""
    stack, found = [model], []
    while stack:
        module = stack.pop()
        stack += [child for child in module._modules.values() if child is not None]
        found += [id(p) for p in module._parameters.values() if p is not None and p.requires_grad]
    return found


def check_parameters(model: nn.Module, groups: Sequence[Mapping[str, Any]], reached: bool) -> None:
    """After a backward pass: raise RuntimeError if a trainable parameter of the model is in no group.

    Also if no parameter has a gradient, unless ``reached``: a backward pass made some, and somebody dropped them.
    """
    held = {id(p) for group in groups for p in group["params"]}
    if missing := [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]:
        raise RuntimeError(
            f"{len(missing)} trainable parameters of the model are in no group of this optimizer "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}): they were added or replaced after FNGD "
            "was built (by PEFT, a new head, load_state_dict(assign=True)). Build FNGD on the complete model, or use "
            "FNGDFactory. Where a trainer wraps the model itself, as TRL's with peft_config, leave optimizers= out and "
            "set trainer.optimizer_cls_and_kwargs = (FNGDFactory, {...}) before train()"
        )
    if foreign := held - {id(p) for p in model.parameters()}:
        raise RuntimeError(
            f"{len(foreign)} parameters of this optimizer are not parameters of its model: build FNGD after the model "
            "is complete, on the very instance that is trained, or through FNGDFactory"
        )
    if not reached and all(p.grad is None for p in model.parameters()):
        raise RuntimeError(
            "no gradient reached any parameter of this optimizer: it was built on another instance of the model "
            "than the one that is trained, or step() came before backward()"
        )


def in_force(settings: Any, own: Sequence[Mapping[str, Any]], loaded: Sequence[Mapping[str, Any]]) -> Any:
    """Settings in which the values of a loaded state replace those that its groups differ from; the log says so."""
    found: dict[str, Any] = {}
    chosen = [dict(group) for group in settings.param_groups or []]
    told: dict[tuple[str, float, float], list[str]] = {}
    for mine, theirs in zip(own, loaded, strict=True):
        base, _, number = mine["name"].rpartition("_") if mine["name"][-1].isdigit() else (mine["name"], "", "")
        for name in _LOADED:
            if not (name in mine and name in theirs):
                continue
            # A scheduler moves lr, and keeps what was set beside it.
            first = "initial_lr" if name == "lr" else name
            given, value = (float(group.get(first, group[name])) for group in (mine, theirs))
            if given != value:
                told.setdefault((name, value, given), []).append(mine["name"])
            if number and name in ("lr", "weight_decay"):
                if name in chosen[int(number)] or given != value:
                    chosen[int(number)][name] = value
            elif name == "lr" and base.startswith("plain"):
                found["fallback_lr"] = value
            elif not (name == "weight_decay" and base.endswith("no_decay")):
                found[name] = value
    if not told:
        return settings
    logger.warning(
        "the loaded state sets %s: as in torch, its values count and not those that the optimizer had; set others in "
        "its param_groups after loading, and for lr in the scheduler's base_lrs, from which it sets lr in every step",
        "; ".join(f"{name}={new:g} (it was {old:g}) in {', '.join(n)}" for (name, new, old), n in told.items()),
    )
    if settings.fallback_lr is None and found.get("fallback_lr") == found.setdefault("lr", found.get("fallback_lr")):
        found.pop("fallback_lr", None)  # it follows lr
    found = {name: value for name, value in found.items() if value not in (None, settings.effective(name))}
    return dataclasses.replace(settings, **found, param_groups=chosen or settings.param_groups)
