"""A refusal has to be a clear error, in bounded time and memory, and nothing may be executed, written or sent."""

import os
import pickle
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 0.5  # of the processor, a multiple of what the slowest takes
MEMORY = 2**26
LONGEST_MESSAGE = 1000
FORBIDDEN = ("os.", "subprocess.", "socket.", "shutil.", "pickle.find_class", "ctypes.")
HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.getxattr", "os.listxattr")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC


class _Watch:
    """Notes what the interpreter reports of commands, connections, unpickling and writing, while active."""

    def __init__(self) -> None:
        self.active = False
        self.seen: list[str] = []

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.active and (event == "open" or event.startswith(FORBIDDEN)) and event not in HARMLESS:
            reads = event == "open" and (not args[2] & WRITING or ".pyc" in str(args[0]))
            self.seen += [] if reads else [f"{event}{args}"[:200]]


_WATCH = _Watch()
sys.addaudithook(_WATCH)


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def pickled(target: Path) -> bytes:
    return pickle.dumps(Payload(target))


def refusal(run: Callable[[], Any], seconds: float = SECONDS, longest: int = LONGEST_MESSAGE) -> Exception:
    """The error that a call raises.

    Raises:
        AssertionError: it raises none, or another than these three, or not in the bounds.
    """
    raised, start = None, time.process_time()
    _WATCH.seen, _WATCH.active = [], True
    tracemalloc.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run()
    except (ValueError, TypeError, OSError) as error:
        raised = error
    finally:
        _WATCH.active = False
        spent, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert raised is not None, "accepted"
    assert _WATCH.seen == [], "side effects"
    assert spent < seconds, f"took {spent:.2f} s"
    assert peak < MEMORY, f"took {peak / 2**20:.0f} MiB"
    assert len(str(raised)) <= longest, f"a message of {len(str(raised))} characters"
    return raised
