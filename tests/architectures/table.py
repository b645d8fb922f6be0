"""Writes `recipes/results/architectures.md`: ``python -m tests.architectures.table``, from the repository's root."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

from hf_fngd.layers.select import COUPLES
from tests.architectures.families import FAMILIES, Family
from tests.architectures.oracle import Verdict, verdicts
from tests.architectures.registry import MISSED, POSITIONS, PRECONDITIONED, TIED, WEIGHED, kind

TABLE = Path(__file__).parents[2] / "recipes" / "results" / "architectures.md"
FIRST, SMALLER, LONGER = (5, POSITIONS), (3, POSITIONS), (5, POSITIONS + 1)
COLUMNS = ("family", "model class", "tensors", "preconditioned", "plain", "missed", "oracle")
COLUMNS += ("error", "clipped", "error, clipped", "N = T, first / later", "remark")
SHORT = dict(
    zip(MISSED, ("batch not first", "batch ambiguous", "called again", "used elsewhere", "never called"), strict=True)
)


@dataclass
class Totals:
    counts: Counter[str] = field(default_factory=Counter)
    raising: list[str] = field(default_factory=list)
    deceived: list[str] = field(default_factory=list)
    wrong: int = 0
    unexpected: int = 0
    preconditioned_error: float = 0.0
    clipped_error: float = 0.0
    plain_error: float = 0.0


def tally(outcomes: Mapping[str, str]) -> tuple[int, int, int]:
    """Numbers of preconditioned, plain and missed parameters."""
    preconditioned = sum(outcome == PRECONDITIONED for outcome in outcomes.values())
    missed = sum(outcome in MISSED for outcome in outcomes.values())
    return preconditioned, len(outcomes) - preconditioned - missed, missed


def clipped(found: Mapping[str, Verdict]) -> list[Verdict]:
    """Those of the parameters whose samples are clipped."""
    return [verdict for verdict in found.values() if verdict.outcome in (PRECONDITIONED, WEIGHED)]


def row(family: Family, totals: Totals) -> list[str]:
    model = family.build()
    tensors = sum(parameter.requires_grad for parameter in model.parameters())
    head = [family.name, type(model).__name__, str(tensors)]
    totals.counts["tensors"] += tensors
    try:
        first, smaller = verdicts(family, FIRST), verdicts(family, FIRST, SMALLER)
        by_norms = verdicts(family, FIRST, LONGER, sharing="clipped")
        square = (family.square, family.square)
        ambiguous = [wrong(verdicts(family, *sizes)) for sizes in ((square,), (FIRST, square))]
    except RuntimeError as error:
        totals.raising.append(family.name)
        totals.counts["unknown"] += tensors
        return [*head, *["-"] * (len(COLUMNS) - len(head) - 1), f"training raises: {str(error).split('. ')[0]}"]
    outcomes = {name: verdict.outcome for name, verdict in first.items()}
    preconditioned, plain, missed = tally(outcomes)
    totals.counts.update(preconditioned=preconditioned, plain=plain, missed=missed)
    totals.unexpected += sum(outcome != family.expected(name) for name, outcome in outcomes.items())
    totals.wrong += wrong(first) + wrong(smaller) + wrong(by_norms)
    if any(ambiguous):
        totals.deceived.append(f"{family.name} ({max(ambiguous)} tensors)")
    found = [*first.values(), *smaller.values()]
    weighted = [verdict.error for verdict in found if verdict.outcome == PRECONDITIONED]
    rest = [verdict.error for verdict in found if verdict.outcome != PRECONDITIONED]
    rest += [verdict.error for verdict in by_norms.values() if verdict.outcome not in (PRECONDITIONED, WEIGHED)]
    norms = [verdict.error for verdict in clipped(by_norms)]
    totals.counts.update(clipped=len(norms))
    totals.clipped_error = max(totals.clipped_error, *norms, 0.0)
    totals.preconditioned_error = max(totals.preconditioned_error, *weighted, 0.0)
    totals.plain_error = max(totals.plain_error, *rest, 0.0)
    return [
        *head,
        str(preconditioned),
        reasons(plain, outcomes, exclude=MISSED) + tied(family),
        reasons(missed, outcomes, exclude=set(outcomes.values()) - set(MISSED)),
        family.oracle,
        f"{max(weighted):.0e}" if weighted else "-",
        str(len(norms)),
        f"{max(norms):.0e}" if norms else "-",
        " / ".join(f"{count} wrong" if count else "right" for count in ambiguous),
        family.remark,
    ]


def wrong(found: Mapping[str, Verdict]) -> int:
    return sum(not verdict.right for verdict in found.values())


def reasons(count: int, outcomes: Mapping[str, str], exclude: object) -> str:
    """The number of parameters, and after it how many there are for each reason."""
    suffix = kind("")
    short = Counter(
        SHORT.get(outcome, outcome.removesuffix(f": {COUPLES}").removesuffix(suffix))
        for outcome in outcomes.values()
        if outcome != PRECONDITIONED and outcome not in exclude
    )
    return f"{count}: " + ", ".join(f"{reason} {n}" for reason, n in short.items()) if count else "0"


def tied(family: Family) -> str:
    return f"; tied to these: {family.outcomes[TIED]}" if family.outcomes[TIED] else ""


def parse(text: str) -> dict[str, dict[str, str]]:
    """The rows of a written table by family, each by column."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {cells[0]: dict(zip(COLUMNS, cells, strict=False)) for cells in rows[1:]}


def render() -> str:
    totals = Totals()
    rows = [row(family, totals) for family in FAMILIES.values()]
    counts = totals.counts
    lines = [
        "# Architectures",
        "",
        f"Written by `python -m tests.architectures.table` (torch {torch.__version__.split('+')[0]}, transformers "
        f"{transformers.__version__}, CPU, float64): tiny models with random parameters, no dropout, damping 0.03, "
        "every step a coefficient step but for those of the columns on clipping.",
        "",
        "- **tensors**: trainable parameter tensors, each counted once; **plain**: those that get the plain gradient "
        "by their kind, with the types of their modules; **missed**: those of Linear, Conv1D and "
        "convolution layers that get it nevertheless, with the reasons of the coverage report, shortened.",
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
        *("| " + " | ".join(cells) + " |" for cells in rows),
        "",
        f"Total: {len(rows)} families, {counts['tensors']} trainable tensors; {counts['preconditioned']} "
        f"preconditioned, {counts['plain']} plain, {counts['missed']} missed, {counts['unknown']} in families that do "
        f"not train; {counts['clipped']} clipped. Largest error of a preconditioned gradient "
        f"{totals.preconditioned_error:.0e}, of a clipped one {totals.clipped_error:.0e}, of a plain or missed one "
        f"{totals.plain_error:.0e} against the plain model's.",
        "",
        "Surprises:",
        "",
        f"- gradients that are not what the report says, N and T different: {totals.wrong}",
        f"- outcomes other than those written down in `tests/architectures`: {totals.unexpected}",
        f"- families in which a layer takes positions for samples when N = T: {listed(totals.deceived)}",
        f"- families that do not train: {listed(totals.raising)}",
        "",
    ]
    return "\n".join(lines)


def listed(names: list[str]) -> str:
    return f"{len(names)}, {', '.join(names)}" if names else "none"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    TABLE.write_text(render())
