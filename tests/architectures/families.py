"""All families in the order of the table: text first, which media imports."""

from tests.architectures import media, text  # noqa: F401
from tests.architectures.registry import FAMILIES, Family

__all__ = ["FAMILIES", "Family"]
