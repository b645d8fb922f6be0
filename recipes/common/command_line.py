"""Options as the words of a command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def words(options: Mapping[str, Any]) -> list[str]:
    """Return options as command line words; those that are None are left out."""
    line: list[str] = []
    for key, value in options.items():
        if isinstance(value, list):
            line += [f"--{key}", *map(str, value)]
        elif isinstance(value, dict):
            line.append(f"--{key}={json.dumps(value)}")
        elif value is not None:
            line.append(f"--{key}={value}")
    return line
