"""Shared by all tests."""

import gc
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported: one thread a worker, or the workers of a parallel run wait for each other's threads.
os.environ["OMP_NUM_THREADS"] = "1"
# Nothing a test does may reach the Hub.
os.environ["HF_HUB_OFFLINE"] = "1"

# How fast examples are made says more of the machine's load than of the tests.
settings.register_profile("any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")


def pytest_collection_finish() -> None:
    """What was imported until now stays: no collection need go through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing is compiled yet, and nothing stays compiled."""
    import torch

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
