"""The registry with every mode in it; the modules that are imported here hold the rows of the table, in this order."""

from tests.modes import arithmetic, batches, models, processes
from tests.modes.registry import MODES

__all__ = ["MODES", "arithmetic", "batches", "models", "processes"]
