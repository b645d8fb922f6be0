"""``clipped``: weights from the samples' gradient norms alone, in every step."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from hf_fngd.clipping import clip
from hf_fngd.sharing.base import SharingPolicy, register_policy


@register_policy
class ClippedSharing(SharingPolicy):
    """Each sample's gradient is clipped, layer by layer, at the mean norm of its batch.

    One that is X times as long as the N - 1 others is ``1 + (X - 1) / N`` times as long then. A bound that leaves no
    such lead, as the median, silences the few samples that a well fitted model has yet to learn, whose gradients are
    outsized too. The norms are the cheap ``||a_n|| ||g_n||``. Of the Fisher matrix this keeps the sizes of the samples'
    gradients and no directions; there is no damping, and nothing to store.
    """

    name: ClassVar[str] = "clipped"
    natural: ClassVar[bool] = False
    needs_norms: ClassVar[bool] = True

    def weigh(self, norms: Tensor | None) -> Tensor:
        """See `SharingPolicy.weigh`."""
        assert norms is not None
        return clip(norms)
