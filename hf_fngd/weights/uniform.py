"""``uniform``: all sample weights are 1. Compare with it to see what the sample weights contribute."""

from hf_fngd.weights.base import SharingPolicy, StoredWeights, register_policy


@register_policy
class UniformSharing(SharingPolicy):
    """Averaging, as first-order methods do."""

    name = "uniform"
    compares = False

    @property
    def exchanges(self) -> bool:
        return False

    def begin(self, size: int, offset: int) -> StoredWeights:
        return StoredWeights(size)
