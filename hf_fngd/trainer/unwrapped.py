"""Find the FNGD inside the optimizer that a Trainer holds."""

from typing import Any

import torch

from hf_fngd.optimizer import FNGD


def unwrap(optimizer: torch.optim.Optimizer) -> FNGD:
    """The FNGD in a wrapper, such as Accelerate's ``trainer.optimizer``. Raises TypeError if there is none."""
    inside: Any = optimizer
    while not isinstance(inside, FNGD):
        if not hasattr(inside, "optimizer"):
            outer, inner = (
                f"class {a.__name__}" if isinstance(a, type) else type(a).__name__ for a in (optimizer, inside)
            )
            raise TypeError(
                f"there is no FNGD in this {outer}, but {inner}: pass optimizers=(FNGD(model), None) to Trainer"
            )
        inside = inside.optimizer
    return inside
