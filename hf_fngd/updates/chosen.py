"""The argument ``param_groups``: what a user's group may say, and which parameters of a model it means."""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hf_fngd.checks import MAX_NAMES, NOT_NEGATIVE, choice, guess, modules, shown, text, wrong_type
from hf_fngd.layers.modules import may_train
from hf_fngd.layers.select import matches
from hf_fngd.updates.base import RULES

Chosen = Sequence[Mapping[str, Any]]

_NAMES = "a regular expression, or a list of names, Parameters or (name, Parameter) pairs"
_OPTIONAL = {"lr": NOT_NEGATIVE, "weight_decay": NOT_NEGATIVE, "update": choice(RULES)}


def chosen_groups(key: str, value: Any) -> list[dict[str, Any]]:
    """Check the argument ``param_groups``. Iterators become lists, and (name, Parameter) pairs become Parameters."""
    if not isinstance(value, list | tuple):
        raise wrong_type(key, value, "None or a list of dicts, one a group")
    if not 0 < len(value) <= MAX_NAMES:
        raise ValueError(f"{key} must hold 1 to {MAX_NAMES} groups, got {len(value)}")
    return [_group(f"{key}[{number}]", group) for number, group in enumerate(value)]


def _group(key: str, value: Any) -> dict[str, Any]:
    accepted = f"a dict with 'params' and any of {', '.join(map(repr, _OPTIONAL))}"
    if not isinstance(value, Mapping) or "params" not in value:
        raise wrong_type(key, value, accepted)
    if unknown := [name for name in value if name != "params" and name not in _OPTIONAL]:
        hint = "; use 'lr'" if unknown[0] == "learning_rate" else guess(unknown[0], list(_OPTIONAL))
        raise wrong_type(key, value, f"{accepted}, and has no key {shown(unknown[0])}{hint}")
    found = {"params": _params(f"{key}['params']", value["params"])}
    return found | {name: _OPTIONAL[name](f"{key}[{name!r}]", value[name]) for name in _OPTIONAL if name in value}


def _params(key: str, value: Any) -> Any:
    if isinstance(value, str):
        return modules(_NAMES, fewest=1)(key, value)
    if isinstance(value, Tensor):
        value = [value]
    if isinstance(value, Iterator):  # as model.parameters() is one
        value = list(itertools.islice(value, MAX_NAMES + 1))
    if not isinstance(value, list | tuple):
        raise wrong_type(key, value, _NAMES)
    if not 0 < len(value) <= MAX_NAMES:
        raise ValueError(f"{key} must hold 1 to {MAX_NAMES} names or parameters, got {len(value)}")
    return [_entry(f"{key}[{number}]", entry) for number, entry in enumerate(value)]


def _entry(key: str, value: Any) -> Any:
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        value = value[1]
    return value if isinstance(value, Tensor) else text(key, value, "a name, a Parameter or a (name, Parameter) pair")


def assigned(model: nn.Module, chosen: Chosen) -> dict[int, int]:
    """Find the parameters in the user's groups. Returns the number of the group by the parameter's ``id``.

    A regular expression has to match a parameter's whole name. A name in a list names a parameter, or a module that
    holds it, in full or by its last dotted parts. Quantized parameters are left out.

    Raises:
        ValueError: an entry means no parameter of the model, or only quantized ones, or a parameter is in two groups.
    """
    if not chosen:
        return {}
    names = {id(p): name for name, p in model.named_parameters()}
    known, meant = dict(model.named_parameters(remove_duplicate=False)), _meant(model)
    found: dict[int, int] = {}
    for number, group in enumerate(chosen):
        key, params = f"param_groups[{number}]['params']", group["params"]
        for entry in [params] if isinstance(params, str) else params:
            if isinstance(entry, Tensor):
                if id(entry) not in names:
                    raise ValueError(
                        f"{key} holds a Parameter of the shape {tuple(entry.shape)} that is none of the model's: take "
                        "it from the very instance that FNGD is built on, after PEFT wrapped it, or give its name"
                    )
                held: Sequence[Tensor] = [entry]
            elif entry is params:
                held = [p for name, p in known.items() if matches(name, entry)]
            else:
                held = [known[name] for name in meant.get(entry, ())]
            if not held:
                raise ValueError(_no_match(key, entry, entry is params and entry in meant, list(known)))
            trained = [p for p in held if may_train(p)]
            if not trained:
                raise ValueError(
                    f"{key} means {names[id(held[0])]}, which is quantized ({held[0].dtype}): leave it out"
                )
            for p in trained:
                if found.setdefault(id(p), number) != number:
                    raise ValueError(
                        f"{names[id(p)]} is in two groups, param_groups[{found[id(p)]}] and param_groups[{number}]: "
                        "each parameter can have one"
                    )
    return found


def by_name(model: nn.Module, chosen: Chosen) -> list[dict[str, Any]]:
    """The same groups with names in place of Parameters, as a config can keep them."""
    names, meant = {id(p): name for name, p in model.named_parameters()}, _meant(model)
    found = []
    for group in chosen:
        params = group["params"]
        if any(isinstance(entry, Tensor) for entry in params):
            params = [names[id(entry)] if isinstance(entry, Tensor) else entry for entry in params]
            own = {name for name, entry in zip(params, group["params"], strict=True) if isinstance(entry, Tensor)}
            if any(len(meant[name]) > 1 for name in own):  # the name would mean another parameter as well
                every = (name for entry in params for name in ([entry] if entry in own else meant[entry]))
                params = "|".join(map(re.escape, dict.fromkeys(every)))
        found.append({**group, "params": params})
    return found


def _meant(model: nn.Module) -> dict[str, list[str]]:
    """For every name that a list may hold (any run of dotted parts), the names of the parameters that it means."""
    meant = defaultdict(list)
    for name, _ in model.named_parameters(remove_duplicate=False):
        parts = name.split(".")
        places = itertools.combinations(range(len(parts) + 1), 2)
        for run in dict.fromkeys(".".join(parts[start:end]) for start, end in places):
            meant[run].append(name)
    return meant


def _no_match(key: str, entry: str, listed: bool, names: Sequence[str]) -> str:
    like = f"its parameters are named like {', '.join(map(repr, names[:5]))}"
    if listed:
        return (
            f"{key}={shown(entry)} is a regular expression, which has to match the whole name of a parameter, and "
            f"matches none: for what has this name, or is within it, give a list, [{shown(entry)}]; {like}"
        )
    return f"{key} has {shown(entry)}, which means no parameter of the model; {like}"
