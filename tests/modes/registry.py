"""The modes by name: what a row of the table is.

A mode is a function of the kind of model, the sharing policy and an empty folder. It trains for a few steps, and
returns the largest relative error of any layer's gradient (`checked` makes it of a record). One that
has to start processes of its own may do so and return what they found. A new row is one function:

    @mode("bf16 autocast", tolerance=0.1)
    def bf16(kind: Kind, sharing: str, folder: Path) -> float:
        return checked(kind, sharing, train(kind, sharing, folder, bf16=True))
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.modes.harness import Record, Stream, train
from tests.modes.nets import Kind
from tests.modes.oracle import compare

# "never" computes coefficients in every step, "replay" uses the first epoch's in all later ones, "clipped" has none.
SHARINGS = ("never", "replay", "clipped")
# fp32 gradients against float64 ones.
FP32 = 1e-5

Run = Callable[[Kind, str, Path], float]


@dataclass(frozen=True)
class Mode:
    """A row.

    Attributes:
        name: as the table writes it.
        run: the function.
        tolerance: for the error.
        refused: words of the message with which FNGD refuses the mode; None where it runs.
        tested_in: where else it is tested, if it takes long.
    """

    name: str
    run: Run
    tolerance: float
    refused: str | None = None
    tested_in: str | None = None


MODES: dict[str, Mode] = {}


def mode(
    name: str, *, tolerance: float = FP32, refused: str | None = None, tested_in: str | None = None
) -> Callable[[Run], Run]:
    """Decorator: make a function a row."""

    def register(run: Run) -> Run:
        assert name not in MODES
        MODES[name] = Mode(name, run, tolerance, refused, tested_in)
        return run

    return register


def checked(kind: Kind, sharing: str, record: Record, *, shares: bool = True, **options: Any) -> float:
    """The error of a run, once it is sure that the run shows something.

    The weights have to matter to every layer's gradient, and the steps to be of the kinds that the policy stands for.

    Args:
        kind: of the model.
        sharing: the policy's name.
        record: of the run.
        shares: whether the run is long enough for shared steps.
        options: of `compare`.
    """
    found = compare(kind, record, **options)
    assert found.contrast > 0.3, "plain gradients would have passed"
    assert found.coefficient_steps > 0 or sharing == "clipped"
    assert (found.shared_steps > 0) == (sharing == "clipped" or (shares and sharing != "never"))
    return found.error


def simple(
    sizes: list[list[int]] | None = None,
    smoothing: float = 0.0,
    shares: bool = True,
    stream: bool = False,
    **changes: Any,
) -> Run:
    """A run with other `TrainingArguments`, and the batch sizes of each of its steps."""

    def run(kind: Kind, sharing: str, folder: Path) -> float:
        data = Stream(kind.data(changes["samples"])) if stream else None
        record = train(kind, sharing, folder, data=data, **changes)
        assert sizes is None or sizes_of(record) == sizes
        return checked(kind, sharing, record, shares=shares, smoothing=smoothing)

    return run


def sizes_of(record: Record) -> list[list[int]]:
    return [[len(batch.inputs["input_ids"]) for batch in step.batches] for step in record.steps]
