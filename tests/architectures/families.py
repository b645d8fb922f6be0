"""The registry with all families in it."""

from tests.architectures import decoders, encoders, others
from tests.architectures.registry import FAMILIES, Family

__all__ = ["FAMILIES", "Family", "decoders", "encoders", "others"]
