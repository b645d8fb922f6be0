"""``clipped``: weights from the samples' gradient norms alone, in every step."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from hf_fngd.clipping import clip, mean_norm
from hf_fngd.environment import rank_and_world
from hf_fngd.sharing.base import SharingPolicy, State, register_policy


@register_policy
class ClippedSharing(SharingPolicy):
    """Each sample's gradient is clipped, layer by layer, at the mean norm of its batch.

    One that is X times as long as the B - 1 others is ``1 + (X - 1) / B`` times as long then. A bound that leaves no
    such lead, as the median, silences the few samples that a well fitted model has yet to learn, whose gradients are
    outsized too. The norms are the cheap ``||a_n|| ||g_n||``. Of the Fisher matrix this keeps the sizes of the samples'
    gradients and no directions; there is no damping.

    The batch is that of the optimizer's step. Where it comes in several micro-batches, of one process or of many, the
    others' norms are not known yet: those of the last step stand for them. Where it comes in one, nothing is kept, and
    scaling the loss changes no weight.

    Attributes:
        parts: how many micro-batches a step has, the most that any had.
        means: mean norms of the last step ``[P]``, NaN where there was none; None as long as ``parts`` is 1.
    """

    name: ClassVar[str] = "clipped"
    natural: ClassVar[bool] = False
    needs_norms: ClassVar[bool] = True

    def prepare(self, layers: int, coefficient_steps: int, memory_budget: int) -> None:
        """See `SharingPolicy.prepare`."""
        super().prepare(layers, coefficient_steps, memory_budget)
        self.parts = 1
        self.means: Tensor | None = None

    def weigh(self, norms: Tensor | None, place: int) -> Tensor:
        """See `SharingPolicy.weigh`."""
        assert norms is not None
        bound = mean_norm(norms)
        if self.means is not None:
            known = self.means[place].to(bound)
            together = (bound.nan_to_num(nan=0.0) + (self.parts - 1) * known) / self.parts
            bound = torch.where(known.isnan(), bound, together)
        return clip(norms, bound)

    def wants_norms(self, micro_batches: int) -> bool:
        """See `SharingPolicy.wants_norms`."""
        return max(micro_batches, self.parts) > 1

    def remember(self, means: Tensor) -> None:
        """See `SharingPolicy.remember`."""
        self.parts = max(self.parts, len(means))
        fresh = means.nanmean(dim=0)
        known = torch.full_like(fresh, torch.nan) if self.means is None else self.means
        self.means = torch.where(fresh.isfinite(), fresh, known)

    def state_dict(self) -> State:
        """See `SharingPolicy.state_dict`; the norms are those of one process that accumulates all micro-batches."""
        _, world = rank_and_world()  # whose gradients are averaged, where one process adds such means
        return {} if self.means is None else {"parts": self.parts, "means": self.means / world}

    def load_state_dict(self, state: State) -> None:
        """See `SharingPolicy.load_state_dict`."""
        self.parts, self.means = 1, None
        if state:
            _, world = rank_and_world()
            self.parts, self.means = state["parts"], state["means"] * world
