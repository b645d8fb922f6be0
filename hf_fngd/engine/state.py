"""Refuses a saved state that is damaged, or of another model or settings, before anything of it is loaded."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_fngd.weights.base import State

# Policies of version 0.1.0 that later versions do not have.
GONE = ("index", "last", "ranked", "sketched")
# What kept a layer of version 0.1.0 plain and no longer does: a convolution behind other layers.
_NO_REASON = {"", "its input needs a gradient, which weights would change"}


def check_state(state: Mapping[str, Any], sharing: str, layers: Sequence[str]) -> State:
    """A state in the form of today's version; ValueError where it is damaged, or of another policy or other layers."""
    check_keys(state, ("layers", "sharing", "policy"))
    if state["sharing"] in GONE:
        raise gone(f"sharing={state['sharing']!r}")
    if state["sharing"] != sharing:
        raise ValueError(
            f"the checkpoint was made with sharing={state['sharing']!r}, this optimizer has sharing={sharing!r}; "
            "resume with the former, or start a new run"
        )
    found = _of_0_1_0(state, layers) if "averages" in state else dict(state)
    if list(found["layers"]) != list(layers):
        differing = sorted(set(found["layers"]) ^ set(layers)) or ["the order"]
        raise ValueError(
            f"the checkpoint has {len(found['layers'])} attached layers, this model has {len(layers)}; they differ in "
            f"{', '.join(differing[:3])}: build the optimizer with the model, target_modules, exclude_modules and "
            "layer_types that the checkpoint was made with"
        )
    return found


def gone(settings: str) -> ValueError:
    """The error for settings that version 0.1.0 was the last to have."""
    return ValueError(
        f"the checkpoint was made with {settings}, which this version of hf_fngd does not have: version 0.1.0 (commit "
        "2cdc4ef) is the last one that reads it"
    )


def _of_0_1_0(state: Mapping[str, Any], layers: Sequence[str]) -> State:
    """From the state of version 0.1.0, which kept other layers apart and knew fewer types of them."""
    check_keys(state, ("phase", "place"))
    known = {name: [batch_first, [], repeated, False] for name, (batch_first, repeated) in state["layers"].items()}
    for name, (batch_first, reasons) in state.get("rest", {}).items():
        known[name] = [batch_first, sorted(set(reasons.split("; ")) - _NO_REASON), False, False]
    # A preconditioned layer that the checkpoint has and this model has not is left in, and refused.
    names = [*layers, *(name for name in state["layers"] if name not in layers)]
    policy = dict(state["policy"])
    if state["sharing"] in ("never", "replay"):
        policy = {"rows": None, **state["phase"], **policy, "place": state["place"], "averages": state["averages"]}
    elif state["sharing"] == "clipped" and policy:
        means: dict[str, Tensor] = dict(zip(known, policy["means"].unbind(), strict=True))
        policy["means"] = torch.stack([means.get(name, policy["means"].new_zeros(())) for name in names])
    own = {name: known.get(name, [None, [], False, False]) for name in names}
    return {"layers": own, "sharing": state["sharing"], "policy": policy}


def check_keys(state: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Raise ValueError where a state lacks a key."""
    if missing := [key for key in keys if key not in state]:
        raise ValueError(
            f"this optimizer state lacks {', '.join(missing)}: it is damaged, or of another version of FNGD"
        )


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
    found, expected = ([group["rule"] for group in of] for of in (state["param_groups"], groups))
    if found != expected:
        raise ValueError(
            f"the checkpoint's update rules are {found}, this optimizer's are {expected}: construct FNGD with "
            "the update, fallback and param_groups that the checkpoint was made with"
        )
    for stored, own in zip(state["param_groups"], groups, strict=True):
        names = stored.get("param_names", own["param_names"])
        if names != own["param_names"] or len(stored["params"]) != len(own["params"]):
            differing = sorted(set(names) ^ set(own["param_names"]))
            raise ValueError(
                f"the checkpoint's parameters in the group {own['name']!r} are not this optimizer's"
                + (f" (only one has {', '.join(differing[:3])})" if differing else ", or in another order")
                + ": resume with the model, param_groups, target_modules and frozen layers of the checkpoint"
            )
        for key, name, p in zip(stored["params"], own["param_names"], own["params"], strict=True):
            for entry, value in state["state"].get(key, {}).items():
                if isinstance(value, Tensor) and value.dim() > 0 and value.shape != p.shape:
                    raise ValueError(
                        f"the checkpoint's {entry} of {name} has the shape {tuple(value.shape)}, the parameter has "
                        f"{tuple(p.shape)}: resume with the model that the checkpoint was made with"
                    )
