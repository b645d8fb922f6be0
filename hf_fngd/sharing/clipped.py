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
    outsized too. The norms are the cheap ``||a_n|| ||g_n||``; those that are 0 have no part in the mean. Of the Fisher
    matrix this keeps the sizes of the samples' gradients and no directions; there is no damping.

    The batch is that of the optimizer's step. Where it comes in M micro-batches, of one process or of many, the M - 1
    others' norms are not known yet, and the mean norm of the last step stands for theirs. A shorter step, as the last
    of an epoch may be, is not remembered, unless a second one follows. Where a step is one micro-batch of one process,
    the weights depend on nothing else, and scaling the loss changes none of them; elsewhere a change of the loss's
    scale between two steps makes the bound too wide or too narrow for one.

    Attributes:
        parts: M.
        means: mean norms in the last step of M micro-batches ``[P]``; 0 where there never were any.
        shorter: whether the last step had fewer.
    """

    name: ClassVar[str] = "clipped"
    natural: ClassVar[bool] = False
    needs_norms: ClassVar[bool] = True

    def prepare(self, layers: int, coefficient_steps: int, memory_budget: int, rest: int = 0) -> None:
        """See `SharingPolicy.prepare`."""
        super().prepare(layers, coefficient_steps, memory_budget, rest)
        self.parts, self.shorter = 1, False
        self.means = torch.zeros(layers + rest)

    def weigh(self, norms: Tensor | None, place: int) -> Tensor:
        """See `SharingPolicy.weigh`."""
        assert norms is not None
        bound = mean_norm(norms)
        if self.parts > 1:
            known = self.means[place].to(bound)
            own = torch.where(bound.isnan(), 0, bound)  # where no sample has a gradient
            bound = torch.where(known == 0, bound, (own + (self.parts - 1) * known) / self.parts)
        return clip(norms, bound)

    def wants_norms(self, micro_batches: int) -> bool:
        """See `SharingPolicy.wants_norms`."""
        return rank_and_world()[1] > 1 or max(micro_batches, self.parts) > 1

    def remember(self, sums: Tensor, counts: Tensor, micro_batches: int) -> None:
        """See `SharingPolicy.remember`."""
        if micro_batches == 0:
            return
        first, self.shorter = micro_batches < self.parts and not self.shorter, micro_batches < self.parts
        if first:
            return
        self.parts, self.shorter = micro_batches, False
        fresh = sums / counts
        self.means = torch.where(fresh.isfinite(), fresh, self.means.to(fresh))

    def state_dict(self) -> State:
        """See `SharingPolicy.state_dict`."""
        return {"parts": self.parts, "shorter": self.shorter, "means": self.means, "world": rank_and_world()[1]}

    def load_state_dict(self, state: State) -> None:
        """See `SharingPolicy.load_state_dict`."""
        if not state:  # of a version that kept nothing
            self.parts, self.shorter, self.means = 1, False, torch.zeros_like(self.means)
            return
        self.parts, self.shorter, self.means = state["parts"], state["shorter"], state["means"]
        world = rank_and_world()[1]
        if world != state["world"]:  # a process's mean loss has R times its part in the mean of R processes
            self.means = self.means * world / state["world"]
