"""The modes, in the order of the table: a file a topic."""

from importlib import import_module

from tests.modes.registry import MODES

__all__ = ["MODES"]

for topic in ("precision", "batches", "wrapped", "processes", "refusals"):
    import_module(f"tests.modes.{topic}")
