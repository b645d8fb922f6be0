"""``never``: nothing is shared; every step computes its own coefficients (natural gradient descent)."""

from __future__ import annotations

from typing import ClassVar

from hf_fngd.sharing.base import SharingPolicy, register_policy


@register_policy
class NeverSharing(SharingPolicy):
    """Plain natural gradient descent, the paper's "w/o sharing" (Tab. IV)."""

    name: ClassVar[str] = "never"
    always: ClassVar[bool] = True
