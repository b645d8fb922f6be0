"""Whether a saved state is whole, and of this model and these settings; checked before anything of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def check_state(
    state: Mapping[str, Any], sharing: str, layers: Sequence[str], rest: Sequence[str]
) -> Mapping[str, Sequence[Any]]:
    """Refuse the state of another preconditioner.

    Args:
        state: what `FNGDPreconditioner.state_dict` returned.
        sharing: name of the sharing policy.
        layers: names of the preconditioned layers, in their order.
        rest: those of the weighed modules outside of the layers.

    Returns:
        The state of the rest by name; an empty one from before the rest was weighed.

    Raises:
        ValueError: the state belongs to another policy or to other layers.
    """
    check_keys(state, ("phase", "place", "averages", "layers", "sharing", "policy"))
    if state["sharing"] != sharing:
        raise ValueError(
            f"the checkpoint was made with sharing={state['sharing']!r}, this optimizer has sharing={sharing!r}; "
            "resume with the former, or start a new run"
        )
    found = state["layers"]
    if list(found) != list(layers):
        differing = sorted(set(found) ^ set(layers)) or ["the order"]
        raise ValueError(
            f"the checkpoint has {len(found)} preconditioned layers, this model has {len(layers)}; they differ "
            f"in {', '.join(differing[:3])}: build the optimizer with the model, target_modules and "
            "exclude_modules that the checkpoint was made with"
        )
    weighed: Mapping[str, Sequence[Any]] = state.get("rest", {name: [None, ""] for name in rest})
    if list(weighed) != list(rest):
        raise ValueError(
            f"the checkpoint weighs the samples of {', '.join(weighed) or 'no embedding'}, this optimizer those of "
            f"{', '.join(rest) or 'none'}: resume with the weigh_rest and the exclude_modules that the checkpoint was "
            "made with"
        )
    return weighed


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
