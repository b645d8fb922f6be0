"""``sketched``: every step computes its own coefficients, from a Gram matrix of randomly projected gradients."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_fngd.sharing.base import register_policy
from hf_fngd.sharing.never import NeverSharing

# Numbers of projected features: the least, as fewer make the samples' norms inaccurate, and a divisor.
_LEAST, _DIVISOR = 32, 8


@register_policy
class SketchedSharing(NeverSharing):
    """Nothing is shared, as in `NeverSharing`, at a fraction of its cost.

    The Gram matrix is that of ``C_o h_n C_i^T``, which has a few dozen times N entries in place of o times i, and is
    formed from ``a C_i^T`` and ``g C_o^T``. The matrices C are count sketches: each feature is added, with a random
    sign, to one of a few sums; their inner products are those of h_n in expectation. Only the weights are approximate,
    the weighted sum has the whole h_n; a layer with fewer entries than that is not projected.

    Args:
        oversampling: least number of entries of a projected gradient for each sample of the batch. Lower ones let
            more noise into the weights.
    """

    name: ClassVar[str] = "sketched"

    def __init__(self, oversampling: int = 32) -> None:
        if oversampling < 1:
            raise ValueError(
                f"SketchedSharing(oversampling={oversampling}): it is the number of entries of a projected gradient "
                "for each sample of a batch, at least 1"
            )
        self.oversampling = oversampling
        self._signs: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def reduce(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """See `SharingPolicy.reduce`."""
        inputs, outputs = self.sizes(a.shape[0], a.shape[-1], g.shape[-1])
        # Different seeds, lest layers as wide as they are deep add the same features of both.
        return self._sketch(a, inputs, a.shape[-1]), self._sketch(g, outputs, -g.shape[-1])

    def sizes(self, n: int, i: int, o: int) -> tuple[int, int]:
        """Numbers of projected input and output features for N samples, i and o features.

        About equal; where one of them is limited by the features that there are, the other one makes up for it.
        """
        entries = self.oversampling * n
        inputs = min(i, _round_up(math.sqrt(entries)))
        outputs = min(o, _round_up(entries / inputs))
        return min(i, _round_up(entries / outputs)), outputs

    def _sketch(self, x: Tensor, size: int, seed: int) -> Tensor:
        features = x.shape[-1]
        if size == features:
            return x
        key = (seed, x.device, x.dtype)
        if key not in self._signs:
            # From the number of features alone: alike on all processes and in a resumed run, without a state.
            signs = torch.randint(2, (features,), generator=torch.Generator().manual_seed(seed)) * 2 - 1
            self._signs[key] = signs.to(x)
        x = nn.functional.pad(x * self._signs[key], (0, -features % size))
        return x.view(*x.shape[:-1], -1, size).sum(dim=-2)


def _round_up(number: float) -> int:
    return max(_LEAST, _DIVISOR * math.ceil(number / _DIVISOR))
