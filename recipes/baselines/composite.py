"""Several optimizers, each of its own parameters, behind the interface of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer


class Composite(Optimizer):
    """Steps all of its optimizers; schedulers and clipping see their groups, the first one's first.

    Args:
        name: What to report as the optimizer's name.
        optimizers: The optimizers; no parameter is in two of them.
    """

    def __init__(self, name: str, optimizers: Sequence[Optimizer]) -> None:
        self.name = name
        self.optimizers = list(optimizers)
        super().__init__(self._groups(), {"lr": optimizers[0].defaults["lr"]})

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Do one step of each optimizer."""
        loss = None if closure is None else closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each optimizer, in order."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = self._groups()  # loading made new ones
