"""Which modules' forwards a preconditioner has taken over, and how they are given back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from hf_fngd.swap import restore_forward, swap_forward

Handler = Callable[..., Any]
_LAYER = "_fngd_layer"
_MODEL = "_fngd_model"


class Attachment:
    """The forwards of a model and of some of its layers, sent through handlers (`hf_fngd.swap.swap_forward`).

    It keeps no module alive.

    Args:
        model: the model.
        handler: of the model's forward.
        layers: layers within it, each with the handler of its forward.

    Raises:
        RuntimeError: one of them cannot be attached to; the model is then what it was.
    """

    def __init__(self, model: nn.Module, handler: Handler, layers: Sequence[tuple[nn.Module, Handler]]) -> None:
        try:
            for layer, layer_handler in layers:
                swap_forward(layer, _LAYER, layer_handler)
            # TRL, for one, puts a forward of its own on the model before Trainer asks for the optimizer.
            swap_forward(model, _MODEL, handler, take_replaced=True)
        except RuntimeError:
            detach(model)
            raise
        self._swapped = [(weakref.ref(model), _MODEL, handler)]
        self._swapped += [(weakref.ref(layer), _LAYER, layer_handler) for layer, layer_handler in layers]

    def undo(self) -> None:
        """Give back the forwards that are still sent through these handlers; idempotent."""
        while self._swapped:
            reference, attribute, handler = self._swapped.pop(0)
            module = reference()
            if module is not None and module.__dict__.get(attribute) is handler:
                restore_forward(module, attribute)


def detach(model: nn.Module) -> None:
    """Restore a model that an `FNGDPreconditioner` or an `FNGD` was built on; others are left as they are."""
    for attribute in (_MODEL, _LAYER):
        for module in model.modules():
            if attribute in module.__dict__:
                restore_forward(module, attribute)


def refuse_attached(model: nn.Module) -> None:
    """Refuse a model that is attached to, before anything is swapped, so that it stays as it is.

    Raises:
        RuntimeError: a module of it is attached to an FNGD already.
    """
    for name, module in model.named_modules():
        if _MODEL in module.__dict__ or _LAYER in module.__dict__:
            raise RuntimeError(
                f"the module {name!r} is attached to another FNGD already; call hf_fngd.detach(model) first"
            )
