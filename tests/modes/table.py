"""Writes recipes/results/modes.md: ``python -m tests.modes.table``, from the root of the repository."""

import contextlib
import io
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers

from tests.modes.harness import DAMPING
from tests.modes.nets import KINDS, Kind
from tests.modes.registry import SHARINGS, Mode
from tests.modes.rows import MODES

PATH = Path("recipes/results/modes.md")
WORDS = 40


def cell(mode: Mode, kind: Kind) -> str:
    """What became of a mode in one kind of model, with each of the policies."""
    words, errors = "", []
    for sharing in SHARINGS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                errors.append(mode.run(kind, sharing, Path(folder)))
            except AssertionError as error:
                words = f"WRONG: {error}"
            except (RuntimeError, ValueError, TypeError) as error:
                words = f"refused: {error}"
    if not words:
        verdict = "equal" if all(error < mode.tolerance for error in errors) else "NOT equal"
        words = f"{verdict}, error {max(errors):.1g} (tolerance {mode.tolerance:.1g})"
    shown = words.partition("\n")[0].replace("|", "/").split()
    return " ".join(shown[:WORDS]) + (" ..." if len(shown) > WORDS else "")


def rows(modes: Iterable[Mode]) -> list[list[str]]:
    """One row a mode: its name, and a cell for each kind of model."""
    made = []
    for mode in modes:
        with contextlib.redirect_stdout(io.StringIO()):  # Trainer prints its logs
            made.append([mode.name, *(cell(mode, kind) for kind in KINDS)])
    return made


def write(modes: Iterable[Mode], path: Path) -> None:
    """Write the table."""
    names = " | ".join(kind.name for kind in KINDS)
    lines = [
        "# Modes of the Trainer",
        "",
        "What the optimizer finds in `p.grad`, preconditioned layers and others, step by step, against the dense",
        "float64 oracle (`tests/reference.py`: per-sample gradients of a float64 copy of the model, weights by a",
        "dense solve): the largest relative error of any layer in any step of three runs, one that computes",
        'coefficients in every step (`sharing="never"`), one that replays those of the first epoch',
        f'(`sharing="replay"`), at damping {DAMPING}, and one of `sharing="clipped"` with every type of layer weighed,',
        "norms, embeddings and tables of positions included.",
        "The rows of several processes: float64 parameters after 12 steps, against those of one process that",
        "accumulates the micro-batches of all (the same training, `hf_fngd/distributed/exchange.py`); all processes",
        "agree bit for bit.",
        "Linear: a BERT classifier (a Llama under TRL). Conv1D: a GPT-2 language model. Made by",
        f"`python -m tests.modes.table` with torch {torch.__version__.split('+')[0]} and transformers "
        f"{transformers.__version__} on a CPU.",
        "",
        f"| mode | {names} |",
        "|---" * (1 + len(KINDS)) + "|",
        *("| " + " | ".join(row) + " |" for row in rows(modes)),
        "",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write(MODES.values(), PATH)
