"""``never``: natural gradient descent. Nothing is shared, every optimizer step is a coefficient step."""

from __future__ import annotations

from typing import ClassVar

from hf_fngd.weights.base import register_policy
from hf_fngd.weights.solved import SolvedPolicy


@register_policy
class NeverSharing(SolvedPolicy):
    """Every micro-batch has its own solution of Eq. 9."""

    name: ClassVar[str] = "never"
