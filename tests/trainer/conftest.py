"""Shared by the tests under Trainer."""

from collections.abc import Iterator
from unittest import mock

import pytest


@pytest.fixture(autouse=True)
def no_collection() -> Iterator[None]:
    """Accelerate's, at the start of every run, goes through all that a test session imported."""
    with mock.patch("gc.collect"):
        yield
