"""Shared by all tests."""

from __future__ import annotations

import os

# Before torch is imported: one thread a worker, or the workers of a parallel run wait for each other's threads.
os.environ["OMP_NUM_THREADS"] = "1"
# Nothing a test does may reach the Hub.
os.environ["HF_HUB_OFFLINE"] = "1"
