"""Writes `recipes/results/architectures.md`: ``python -m tests.architectures.table``, from the repository's root."""

import os
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

from tests.architectures.families import FAMILIES, Family
from tests.architectures.oracle import Verdict, verdicts
from tests.architectures.registry import MISSED, POSITIONS, PRECONDITIONED, TIED, WEIGHED, kind

TABLE = Path(__file__).parents[2] / "recipes" / "results" / "architectures.md"
FIRST, SMALLER, LONGER = (5, POSITIONS), (3, POSITIONS), (5, POSITIONS + 1)
COLUMNS = "family | model class | tensors | preconditioned | plain | missed | oracle | error | clipped | error, clipped"
COLUMNS = (*COLUMNS.split(" | "), "N = T, first / later", "remark")
SHORT = dict(
    zip(MISSED, ("batch not first", "batch ambiguous", "called again", "used elsewhere", "never called"), strict=True)
)


@dataclass
class Found:
    """A family's verdicts: of a first batch, of a smaller one after it, by norms, and where N = T, first and later."""

    family: Family
    first: dict[str, Verdict]
    smaller: dict[str, Verdict]
    by_norms: dict[str, Verdict]
    square: tuple[dict[str, Verdict], dict[str, Verdict]]

    @classmethod
    def of(cls, family: Family) -> "Found":
        square = (family.square, family.square)
        return cls(
            family,
            verdicts(family, FIRST),
            verdicts(family, FIRST, SMALLER),
            verdicts(family, FIRST, LONGER, sharing="clipped"),
            (verdicts(family, square), verdicts(family, FIRST, square)),
        )

    @property
    def outcomes(self) -> dict[str, str]:
        return {name: verdict.outcome for name, verdict in self.first.items()}

    def errors(self, *outcomes: str) -> list[float]:
        """Of the first two batches, where these are the outcomes."""
        return [v.error for v in (*self.first.values(), *self.smaller.values()) if v.outcome in outcomes]

    def row(self) -> list[str]:
        family, (preconditioned, plain, missed) = self.family, tally(self.outcomes)
        tied = f"; tied to these: {family.outcomes[TIED]}" if family.outcomes[TIED] else ""
        norms = [verdict.error for verdict in clipped(self.by_norms)]
        square = [f"{count} wrong" if count else "right" for count in map(wrong, self.square)]
        return [
            *(family.name, type(family.build()).__name__, str(len(self.first)), str(preconditioned)),
            reasons(plain, self.outcomes, exclude=MISSED) + tied,
            reasons(missed, self.outcomes, exclude=set(self.outcomes.values()) - set(MISSED)),
            *(family.oracle, largest(self.errors(PRECONDITIONED)), str(len(norms)), largest(norms)),
            *(" / ".join(square), family.remark),
        ]


def tally(outcomes: Mapping[str, str]) -> tuple[int, int, int]:
    """Numbers of preconditioned, plain and missed parameters."""
    preconditioned = sum(outcome == PRECONDITIONED for outcome in outcomes.values())
    missed = sum(outcome in MISSED for outcome in outcomes.values())
    return preconditioned, len(outcomes) - preconditioned - missed, missed


def clipped(found: Mapping[str, Verdict]) -> list[Verdict]:
    """Those of the parameters whose samples are clipped."""
    return [verdict for verdict in found.values() if verdict.outcome in (PRECONDITIONED, WEIGHED)]


def wrong(found: Mapping[str, Verdict]) -> int:
    return sum(not verdict.right for verdict in found.values())


def largest(errors: Iterable[float]) -> str:
    return f"{max(errors):.0e}" if (errors := list(errors)) else "-"


def reasons(count: int, outcomes: Mapping[str, str], exclude: Container[str]) -> str:
    """The number of parameters, and after it how many there are for each reason."""
    others = [outcome for outcome in outcomes.values() if outcome != PRECONDITIONED and outcome not in exclude]
    short = Counter(SHORT.get(outcome, outcome.removesuffix(kind(""))) for outcome in others)
    return f"{count}: " + ", ".join(f"{reason} {n}" for reason, n in short.items()) if count else "0"


def parse(text: str) -> dict[str, dict[str, str]]:
    """The rows of a written table by family, each by column."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {cells[0]: dict(zip(COLUMNS, cells, strict=False)) for cells in rows[1:]}


def render() -> str:
    found = [Found.of(family) for family in FAMILIES.values()]
    every = [of for one in found for of in (one.first, one.smaller, one.by_norms)]
    counts = [sum(numbers) for numbers in zip(*(tally(one.outcomes) for one in found), strict=True)]
    norms = [verdict.error for one in found for verdict in clipped(one.by_norms)]
    rest = [v.error for of in every for v in of.values() if v.outcome not in (PRECONDITIONED, WEIGHED)]
    unexpected = sum(outcome != one.family.expected(name) for one in found for name, outcome in one.outcomes.items())
    deceived = [(one.family.name, max(map(wrong, one.square))) for one in found if any(map(wrong, one.square))]
    lines = [
        "# Architectures",
        "",
        f"Written by `python -m tests.architectures.table` (torch {torch.__version__.split('+')[0]}, transformers "
        f"{transformers.__version__}, CPU, float64): tiny models with random parameters, no dropout, damping 0.03, "
        "every step a coefficient step but for those of the columns on clipping.",
        "",
        "- **tensors**: trainable parameter tensors, each counted once; **plain**: those that get the plain gradient "
        "by their kind, with the types of their modules; **missed**: those of Linear and Conv1D layers that get it "
        "nevertheless, with the reasons of the coverage report, shortened.",
        '- **oracle**: where the per-sample gradients come from. "alone": each sample is run by itself. "captured": '
        "the samples interact, and each one's share is formed from the layer's inputs and output gradients in the "
        "plain model.",
        "- **error**: largest relative distance of a preconditioned parameter's gradient from the dense computation, "
        "for a batch of 5 samples and for a smaller one, of 3, after it.",
        '- **clipped**: how many tensors\' samples are weighed with sharing="clipped" and every layer type (norms, '
        "embeddings, tables, convolutions), and the largest distance of their gradients from the clipped sums of the "
        "per-sample gradients.",
        "- **N = T**: whether all gradients are what the report says when a batch has as many samples as a layer has "
        "positions, if it is the first batch / if it comes after one where the two differ.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(one.row()) + " |" for one in found),
        "",
        f"Total: {len(found)} families, {sum(counts)} trainable tensors; {counts[0]} preconditioned, {counts[1]} "
        f"plain, {counts[2]} missed; {len(norms)} clipped. Largest error of a preconditioned gradient "
        f"{largest(error for one in found for error in one.errors(PRECONDITIONED))}, of a clipped one "
        f"{largest(norms)}, of a plain or missed one {largest(rest)} against the plain model's.",
        "",
        "Surprises:",
        "",
        f"- gradients that are not what the report says, N and T different: {sum(map(wrong, every))}",
        f"- outcomes other than those written down in `tests/architectures`: {unexpected}",
        f"- families in which a layer takes positions for samples when N = T: {len(deceived)}, "
        + ", ".join(f"{name} ({count} tensors)" for name, count in deceived),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    TABLE.write_text(render())
