"""Checks a saved state before any of it is loaded, and brings states of older versions into today's form."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_fngd.weights.base import State

# Policies of version 0.1.0 that later versions do not have.
GONE = ("index", "last", "ranked", "sketched")
# A reason of version 0.1.0 for plain gradients that is none today: convolutions behind other layers are weighed.
_NO_REASON = {"", "its input needs a gradient, which weights would change"}
# The state of a layer that was never called.
_NEW: list[Any] = [None, [], False, False]


def check_state(state: Mapping[str, Any], sharing: str, layers: Sequence[str], frozen: Collection[str] = ()) -> State:
    """Bring a state into the form of today's version.

    Frozen layers may be missing (older versions did not attach them), and the layers may be in another order (older
    versions did not precondition convolutions).

    Raises ValueError where the state is damaged, or is one of another policy or other layers.
    """
    check_keys(state, ("layers", "sharing", "policy"))
    if state["sharing"] in GONE:
        raise gone(f"sharing={state['sharing']!r}")
    if state["sharing"] != sharing:
        raise ValueError(
            f"the checkpoint was made with sharing={state['sharing']!r}, this optimizer has sharing={sharing!r}; "
            "resume with the former, or start a new run"
        )
    found = _of_0_1_0(state, layers) if "averages" in state else dict(state)
    known = list(found["layers"])
    if known != list(layers) and {*known} | {*frozen} >= {*layers} >= {*known}:
        own = {name: found["layers"].get(name, _NEW) for name in layers}
        found |= {"layers": own, "policy": _arranged(found["policy"], known, layers)}
    if list(found["layers"]) != list(layers):
        differing = sorted(set(found["layers"]) ^ set(layers))
        raise ValueError(
            f"the checkpoint has {len(found['layers'])} attached layers, this model has {len(layers)}; they differ in "
            f"{', '.join(differing[:3])}: build the optimizer with the model, target_modules, exclude_modules and "
            "layer_types that the checkpoint was made with"
        )
    return found


def gone(settings: str) -> ValueError:
    """The error for settings that were removed after version 0.1.0."""
    return ValueError(
        f"the checkpoint was made with {settings}, which this version of hf_fngd does not have: version 0.1.0 (commit "
        "2cdc4ef) is the last one that reads it"
    )


def _of_0_1_0(state: Mapping[str, Any], layers: Sequence[str]) -> State:
    """Convert the state of version 0.1.0, which kept layers that are not matrices in a list of their own."""
    check_keys(state, ("phase", "place"))
    weighed = list(state["layers"])
    known = {name: [batch_first, [], repeated, False] for name, (batch_first, repeated) in state["layers"].items()}
    for name, (batch_first, reasons) in state.get("rest", {}).items():
        known[name] = [batch_first, sorted(set(reasons.split("; ")) - _NO_REASON), False, False]
    # A preconditioned layer that this model lacks stays in, so that the check refuses it.
    names = [*layers, *(name for name in state["layers"] if name not in layers)]
    policy = dict(state["policy"])
    if state["sharing"] in ("never", "replay"):
        policy = {"rows": None, **state["phase"], **policy, "place": state["place"], "averages": state["averages"]}
    elif state["sharing"] == "clipped":
        weighed = list(known)
    own = {name: known.get(name, _NEW) for name in names}
    return {"layers": own, "sharing": state["sharing"], "policy": _arranged(policy, weighed, names)}


def _arranged(policy: Mapping[str, Any], known: Sequence[str], names: Sequence[str]) -> State:
    """Bring a policy's state to other layers, by name; a layer that it does not know starts as in a new run."""
    found = dict(policy)
    kept = [name for name in names if name in known]
    old, new = (torch.tensor([of.index(name) for name in kept], dtype=torch.long) for of in (known, names))
    for key, dim, empty in (("means", 0, 0.0), ("averages", 1, torch.nan), ("rows", 1, 1.0)):
        value = policy.get(key)
        if isinstance(value, Tensor) and value.shape[dim] == len(known):  # else the policy will refuse it
            sizes = [len(names) if place == dim else size for place, size in enumerate(value.shape)]
            made = value.new_full(sizes, empty)
            found[key] = made.index_copy_(dim, new.to(value.device), value.index_select(dim, old.to(value.device)))
    return found


def check_keys(state: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Raise ValueError where a state lacks a key."""
    if missing := [key for key in keys if key not in state]:
        raise ValueError(
            f"this optimizer state lacks {', '.join(missing)}: it is damaged, or of another version of FNGD"
        )
