"""How many positions a layer sees in an optimizer step."""

from collections.abc import Sequence

import torch

from hf_fngd.distributed.exchange import rank_and_world, sum_over_processes
from hf_fngd.engine.layer import Layer
from hf_fngd.layers.modules import weight_of


class Positions:
    """How many positions a preconditioned layer sees in a step, in all processes together; update rules read it.

    Attributes:
        count: the number, on average over the weights' entries. 0: no step has told it yet; None: nobody asks.
        trained: how many layers were trained when it was counted.
    """

    def __init__(self, layers: Sequence[Layer], trained: int) -> None:
        self.count: int | None = None
        self.trained = trained
        self._layers = [layer for layer in layers if layer.selected.preconditioned]

    @property
    def unknown(self) -> bool:
        """Whether a step has to tell it."""
        return self.count == 0

    def trains(self, layers: int) -> None:
        """So many layers are trained now: if these are more than before, the next step counts anew."""
        if self.trained < layers:
            self.trained, self.count = layers, self.count and 0

    def find(self, multiplications: int, device: torch.device) -> None:
        """At the end of a step: count, where that is asked. A collective then.

        Args:
            multiplications: those of this process, in the forwards of the layers that backward reached.
            device: of the exchange between several processes.
        """
        if not self.unknown:
            return
        device = torch.device("cpu") if rank_and_world()[1] == 1 else device
        reached = [layer.shared.reached for layer in self._layers]
        own = torch.tensor([multiplications, *reached], dtype=torch.float64, device=device)
        total, *counts = sum_over_processes(own).tolist()
        weights = [weight_of(layer.selected.module) for layer in self._layers]
        entries = sum(w.numel() for w, count in zip(weights, counts, strict=True) if w is not None and count)
        self.count = max(1, round(total / entries)) if total and entries else 0
