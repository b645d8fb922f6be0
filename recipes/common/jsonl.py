"""A file of results, one JSON line each, that an interruption may cut off and a later run goes on with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file, which need not exist; not the one that a kill cut off."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def append_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write lines at once, below one that was cut off; None in place of numbers that JSON does not know."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(["" if whole else "\n", *(json.dumps(finite(record)) + "\n" for record in records)]))


def finite(value: Any) -> Any:
    """Replace numbers that JSON does not know by None."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)
