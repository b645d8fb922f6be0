"""rho and the spread of the sample weights: measured in coefficient steps, carried through the shared ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_fngd.distributed import Measurement

# How much a coefficient step counts in the geometric means that shared steps use.
_RATE = 0.2


class Ratios:
    """Two dimensionless numbers a layer, alike on all processes.

    Attributes:
        rho: noise ratios ``[L]`` of the last step, NaN for layers that never measured one.
        spread: ``mean(w^2)`` of the layers ``[L]``.
        averages: running geometric means of both, ``[2, L]``; None before the first measurement.
    """

    def __init__(self, layers: int) -> None:
        self.rho = torch.full((layers,), torch.nan)
        self.spread = torch.ones(layers)
        self.averages: Tensor | None = None

    def load(self, averages: Tensor | None) -> None:
        """Go on from the running means of a state."""
        self.averages = averages
        self.rho, self.spread = torch.full_like(self.rho, torch.nan), torch.ones_like(self.spread)
        self.update([])

    def update(self, measurements: Sequence[Measurement]) -> None:
        """Those of a step: measured in it, or else the running means."""
        if measurements:
            fresh = torch.stack([torch.stack([m.rho, m.spread]) for m in measurements]).nanmean(dim=0)
            average = fresh if self.averages is None else self.averages
            average = torch.where(average.isnan(), fresh, average)
            moved = torch.exp(torch.lerp(average.log(), fresh.log(), _RATE))
            self.averages = torch.where(fresh.isnan(), average, moved)
            self.rho, self.spread = torch.where(fresh.isnan(), self.averages, fresh)
        elif self.averages is not None:
            self.rho, self.spread = self.averages
        self.spread = self.spread.nan_to_num(nan=1.0)

    def summary(self) -> dict[str, float]:
        """The layers in two numbers; the host waits for the device.

        Returns:
            ``rho`` (geometric mean; not there before it was measured) and ``weight_spread`` (standard deviation of the
            sample weights over their mean, root mean square over the layers).
        """
        known = self.rho[~self.rho.isnan()]
        measured = {"rho": float(known.log().mean().exp())} if known.numel() else {}
        return measured | {"weight_spread": float((self.spread.mean() - 1).clamp(min=0).sqrt())}
