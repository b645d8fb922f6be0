"""Whether the checker of refusals notices what it is there to notice."""

import os
import pickle
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.refusals import pickled, refusal


def fail(error: Exception) -> None:
    raise error


def late() -> None:
    start = time.process_time()
    while time.process_time() - start < 0.6:
        pass
    fail(ValueError())


WRONG: dict[str, tuple[Callable[[Path], object], type[BaseException], str]] = {
    "accepted": (lambda path: None, AssertionError, "accepted"),
    "another error": (lambda path: fail(KeyError("lr")), KeyError, "lr"),
    "a warning beside it": (lambda path: warnings.warn("lr", stacklevel=2), UserWarning, "lr"),
    "a long message": (lambda path: fail(ValueError("x" * 5000)), AssertionError, "a message of 5000 characters"),
    "late": (lambda path: late(), AssertionError, "took 0"),
    "large": (lambda path: fail(ValueError(str(len(bytes(2**27))))), AssertionError, "took 128 MiB"),
    "executes": (lambda path: fail(ValueError(os.system("true"))), AssertionError, "side effects"),
    "writes": (lambda path: fail(ValueError(path.write_text("x"))), AssertionError, "side effects"),
    "unpickles": (lambda path: fail(ValueError(pickle.loads(pickled(path)))), AssertionError, "side effects"),
}


@pytest.mark.parametrize(("run", "error", "message"), WRONG.values(), ids=WRONG)
def test_a_refusal_that_is_none_is_noticed(
    run: Callable[[Path], object], error: type[BaseException], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        refusal(lambda: run(tmp_path / "file"))


def test_a_clear_one_passes() -> None:
    assert str(refusal(lambda: fail(ValueError("lr must be")))) == "lr must be"
