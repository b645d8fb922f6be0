"""What of a trainer would go past FNGD: parameters of its loss, and a column that it drops."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from hf_fngd.samples.ids import COLUMN
from hf_fngd.stack import callers


def calling_trainer() -> Any:
    """The trainer that is calling; None without one."""
    selves = (frame.f_locals.get("self") for frame in callers())
    return next((found for found in selves if hasattr(found, "callback_handler")), None)


def check_loss(model: nn.Module, trainer: Any) -> None:
    """Raise ValueError if the loss of a trainer, if there is one, has trained parameters that are not the model's."""
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


def check_column(trainer: Any) -> None:
    """Raise ValueError if a trainer drops the column of sample ids from its dataset, as the model does not take it."""
    kept = getattr(trainer, "_signature_columns", None)  # None where it keeps all of them
    names = getattr(getattr(trainer, "train_dataset", None), "column_names", None)
    if kept is not None and COLUMN not in kept and isinstance(names, list) and COLUMN in names:
        raise ValueError(
            f"the dataset has the column {COLUMN}, and Trainer drops it before FNGD sees it: set "
            "remove_unused_columns=False in TrainingArguments"
        )
