"""A loaded optimizer's state beside the optimizer's own parameter groups."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def with_frozen(
    state: Mapping[str, Any], groups: Sequence[dict[str, Any]]
) -> tuple[Mapping[str, Any], list[dict[str, Any]]]:
    """Add frozen parameters to an optimizer's state that was saved before its groups held them.

    Returns the state, and the groups that it is for. A group that is frozen as a whole, and is not in the state, is
    left out: a scheduler's state does not have it either.
    """
    stored = {group.get("name"): group for group in state["param_groups"]}
    kept = [group for group in groups if group["name"] in stored or any(p.requires_grad for p in group["params"])]
    fresh, made = itertools.count(sum(len(group["params"]) for group in stored.values())), dict(stored)
    for own in kept:
        live = [name for name, p in zip(own["param_names"], own["params"], strict=True) if p.requires_grad]
        theirs = stored.get(own["name"], {"params": []})
        names = theirs.get("param_names", live if len(live) == len(theirs["params"]) else own["param_names"])
        keys = dict(zip(names, theirs["params"], strict=False))
        expected = [name for name in own["param_names"] if name in keys or name in live]
        if own["param_names"] != names == expected:
            params = [keys[name] if name in keys else next(fresh) for name in own["param_names"]]
            made[own["name"]] = {**theirs, "params": params, **{key: own[key] for key in ("param_names", "layers")}}
    return {**state, "param_groups": list(made.values())}, kept


def check_groups(state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError where an optimizer's state has other groups, update rules or parameters, or another order."""
    theirs, ours = ([group.get("name") for group in of] for of in (state["param_groups"], groups))
    if theirs != ours:
        differing = sorted(set(map(str, theirs)) ^ set(map(str, ours))) or ["the order"]
        raise ValueError(
            f"the checkpoint has {len(theirs)} parameter groups, this optimizer has {len(ours)}; they differ in "
            f"{', '.join(differing[:4])}: construct FNGD with the model, param_groups, target_modules and frozen "
            "layers that the checkpoint was made with"
        )
    rules, expected = ([group["rule"] for group in of] for of in (state["param_groups"], groups))
    if rules != expected:
        raise ValueError(
            f"the checkpoint's update rules are {rules}, this optimizer's are {expected}: construct FNGD with "
            "the update, fallback and param_groups that the checkpoint was made with"
        )
    for stored, own in zip(state["param_groups"], groups, strict=True):
        # A state from before ns_steps was an argument means five.
        for setting, before in (("block_size", None), ("ns_steps", 5)):
            if setting in own and (found := stored.get(setting, before)) != own[setting]:
                raise ValueError(
                    f"the checkpoint's {setting} is {found}, this optimizer's is {own[setting]}: construct FNGD with "
                    f"the {setting} that the checkpoint was made with"
                )
        names = stored.get("param_names", own["param_names"])
        if names != own["param_names"] or len(stored["params"]) != len(own["params"]):
            differing = sorted(set(names) ^ set(own["param_names"]))
            raise ValueError(
                f"the checkpoint's parameters in the group {own['name']!r} are not this optimizer's"
                + (f" (only one has {', '.join(differing[:3])})" if differing else ", or in another order")
                + ": resume with the model, param_groups, target_modules and frozen layers of the checkpoint. An "
                "output head had the update rule before version 0.2.0, and has it with target_modules='.*'"
            )
        for key, name, p in zip(stored["params"], own["param_names"], own["params"], strict=True):
            for entry, value in state["state"].get(key, {}).items():
                if isinstance(value, Tensor) and value.dim() > 0 and value.shape != p.shape:
                    raise ValueError(
                        f"the checkpoint's {entry} of {name} has the shape {tuple(value.shape)}, the parameter has "
                        f"{tuple(p.shape)}: resume with the model that the checkpoint was made with"
                    )
