"""Losses that are modules with parameters of their own, as some of sentence-transformers are."""

import sys
from collections.abc import Mapping
from typing import Any

from torch import nn


def check_loss(model: nn.Module, trainer: Any = None) -> None:
    """Raise ValueError if a trainer's loss has trained parameters that are not the model's.

    Without the argument the trainer is the one that is calling; if there is none, nothing is checked.
    """
    frame = sys._getframe(1)
    while trainer is None and frame is not None:
        found = frame.f_locals.get("self")
        trainer = found if hasattr(found, "callback_handler") else None
        frame = frame.f_back  # type: ignore[assignment]
    loss = getattr(trainer, "loss", None)
    own = {id(p) for p in model.parameters()}
    for module in loss.values() if isinstance(loss, Mapping) else (loss,):
        if isinstance(module, nn.Module):
            names = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in own]
            if names:
                raise ValueError(
                    f"the loss {type(module).__name__} has parameters of its own, {', '.join(names)}, which an FNGD of "
                    "the model does not train: build it on the loss, which holds the model, "
                    "optimizers=(FNGD(loss), None)"
                )
