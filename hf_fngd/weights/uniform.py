"""``uniform``: all sample weights are 1. Compare with it to see what the sample weights contribute."""

from collections.abc import Sequence

from torch import Tensor

from hf_fngd.weights.base import MicroBatchWeights, SharingPolicy, StoredWeights, register_policy


@register_policy
class UniformSharing(SharingPolicy):
    """Averaging, as first-order methods do."""

    name = "uniform"

    @property
    def exchanges(self) -> bool:
        return False

    def close(self, batches: Sequence[MicroBatchWeights], begun: int, like: Tensor) -> int:
        """See `SharingPolicy.close`. Weights of 1 compare no samples, so that no batch has too few: 2 at least."""
        samples = super().close(batches, begun, like)
        return max(samples, 2) if samples else 0

    def begin(self, size: int, offset: int) -> StoredWeights:
        return StoredWeights(size)
