"""Whether a saved state is whole, and of this model and these settings; checked before anything of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]
_KEYS = ("layers", "sharing", "policy")
# Policies of version 0.1.0 that later versions do not have.
_GONE = ("index", "last", "ranked", "sketched")
LAST_WITH_ALL = "0.1.0"


def check_state(state: Mapping[str, Any], sharing: str, layers: Sequence[str]) -> State:
    """Refuse the state of another preconditioner, and bring that of an older version into today's form.

    Args:
        state: what `FNGDPreconditioner.state_dict` returned.
        sharing: name of the sharing policy.
        layers: names of the attached layers, in their order.

    Raises:
        ValueError: the state is not whole, or belongs to another policy or to other layers.
    """
    check_sharing(state)
    check_keys(state, _KEYS)
    if state["sharing"] != sharing:
        raise ValueError(
            f"the checkpoint was made with sharing={state['sharing']!r}, this optimizer has sharing={sharing!r}; "
            "resume with the former, or start a new run"
        )
    found = dict(state) if "rest" not in state and "place" not in state else _of_0_1_0(state, layers)
    if list(found["layers"]) != list(layers):
        differing = sorted(set(found["layers"]) ^ set(layers)) or ["the order"]
        raise ValueError(
            f"the checkpoint has {len(found['layers'])} attached layers, this model has {len(layers)}; they differ in "
            f"{', '.join(differing[:3])}: build the optimizer with the model, target_modules, exclude_modules and "
            "layer_types that the checkpoint was made with"
        )
    return found


def check_sharing(state: Mapping[str, Any]) -> None:
    """Refuse the state of a sharing policy that is gone.

    Raises:
        ValueError: the message names the last version that reads the state.
    """
    if state.get("sharing") in _GONE:
        raise _gone(f"sharing={state['sharing']!r}")


def check_step_scale(state: Mapping[str, Any]) -> None:
    """Refuse the state of a scale of steps that is gone, in what `FNGD` keeps of its own.

    Raises:
        ValueError: the message names the last version that reads the state.
    """
    if state.get("norms") is not None:
        raise _gone("update='momentum' and step_scale='rms'")


def _gone(settings: str) -> ValueError:
    return ValueError(
        f"the checkpoint was made with {settings}, which this version of hf_fngd does not have: version "
        f"{LAST_WITH_ALL} is the last one that reads it (pip install hf-fngd=={LAST_WITH_ALL})"
    )


def _of_0_1_0(state: Mapping[str, Any], layers: Sequence[str]) -> State:
    """The state of version 0.1.0, which kept preconditioned layers and all others apart and knew fewer layer types."""
    check_keys(state, ("phase", "place", "averages", *_KEYS))
    known = {name: [batch_first, "", repeated, False] for name, (batch_first, repeated) in state["layers"].items()}
    known |= {
        name: [batch_first, reasons, False, False] for name, (batch_first, reasons) in state.get("rest", {}).items()
    }
    fresh = [None, "", False, False]
    # A layer that the checkpoint has and this model has not is left in, and refused.
    names = [*layers, *(name for name in state["layers"] if name not in layers)]
    policy = dict(state["policy"])
    if state["sharing"] in ("never", "replay"):
        policy |= {"place": state["place"], "averages": state["averages"]}
        policy = {"rows": None, "phase": state["phase"], **policy} if state["sharing"] == "replay" else policy
    elif state["sharing"] == "clipped" and policy:
        means: dict[str, Tensor] = dict(zip(known, policy["means"].unbind(), strict=True))
        zero = policy["means"].new_zeros(())
        policy["means"] = torch.stack([means.get(name, zero) for name in names])
    return {
        "layers": {name: known.get(name, fresh) for name in names},
        "sharing": state["sharing"],
        "policy": policy,
    }


def check_keys(state: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Refuse a state that is not whole.

    Raises:
        ValueError: it lacks one of the keys.
    """
    if missing := [key for key in keys if key not in state]:
        raise ValueError(
            f"this optimizer state lacks {', '.join(missing)}: it is damaged, or of another version of FNGD"
        )


def check_groups(state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse the state of an optimizer with other update rules, of other parameters, or of the same in another order.

    Args:
        state: torch's state of an optimizer.
        groups: the parameter groups that it is to be loaded into.

    Raises:
        ValueError: it does not fit.
    """
    stored_groups = state["param_groups"]
    rules = [[g["rule"] for g in of] for of in (stored_groups, groups)]
    if rules[0] != rules[1]:
        raise ValueError(
            f"the checkpoint's update rules are {rules[0]}, this optimizer's are {rules[1]}: construct FNGD with "
            "the update and fallback that the checkpoint was made with"
        )
    for stored, own in zip(stored_groups, groups, strict=True):
        names = stored.get("param_names", own["param_names"])
        if names != own["param_names"] or len(stored["params"]) != len(own["params"]):
            differing = sorted(set(names) ^ set(own["param_names"]))
            raise ValueError(
                f"the checkpoint's parameters in the group {own['name']!r} are not this optimizer's"
                + (f" (only one has {', '.join(differing[:3])})" if differing else ", or in another order")
                + ": resume with the model, target_modules and frozen layers that the checkpoint was made with"
            )
        for key, name, p in zip(stored["params"], own["param_names"], own["params"], strict=True):
            for entry, value in state["state"].get(key, {}).items():
                if isinstance(value, Tensor) and value.dim() > 0 and value.shape != p.shape:
                    raise ValueError(
                        f"the checkpoint's {entry} of {name} has the shape {tuple(value.shape)}, the parameter has "
                        f"{tuple(p.shape)}: resume with the model that the checkpoint was made with"
                    )
