"""Who calls: some libraries hand on no reference to what a function needs to know of its callers."""

import sys
from collections.abc import Iterator
from types import FrameType


def callers() -> Iterator[FrameType]:
    """The frames of the calls that lead to the function that iterates, from its own caller outwards."""
    frame = sys._getframe(1).f_back
    while frame is not None:
        yield frame
        frame = frame.f_back
