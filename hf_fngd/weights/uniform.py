"""``uniform``: all sample weights are 1, to tell what the sample weights themselves contribute."""

from __future__ import annotations

from typing import ClassVar

from hf_fngd.weights.base import MicroBatchWeights, Samples, SharingPolicy, register_policy


class Ones(MicroBatchWeights):
    """Sample weights of 1."""

    def weigh(self, layer: int, samples: Samples) -> None:
        return


@register_policy
class UniformSharing(SharingPolicy):
    """Averaging, as first-order methods do."""

    name: ClassVar[str] = "uniform"

    def begin(self, size: int, offset: int) -> Ones:
        return Ones(size)
