"""Whether a saved state is whole, and of this model and these settings; checked before anything of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


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
