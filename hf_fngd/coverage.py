"""The coverage report: which parameters are preconditioned, which are not, and why."""

from __future__ import annotations

from dataclasses import dataclass

NEVER_CALLED = "it was never called in a forward pass of the model in training mode"


@dataclass(frozen=True)
class CoverageReport:
    """What became of every trainable parameter of a model.

    Attributes:
        preconditioned: names of the parameters whose gradient is the weighted sum.
        plain: name to reason, for those that get a plain gradient by their kind.
        missed: name to reason, for those of selected layers that could not be preconditioned in some or all
            steps so far.
    """

    preconditioned: tuple[str, ...]
    plain: dict[str, str]
    missed: dict[str, str]

    def __str__(self) -> str:
        lines = [f"FNGD preconditions {len(self.preconditioned)} parameters."]
        for title, group in (("plain gradient", self.plain), ("could not be preconditioned", self.missed)):
            reasons: dict[str, list[str]] = {}
            for name, reason in group.items():
                reasons.setdefault(reason, []).append(name)
            for reason, names in reasons.items():
                shown = ", ".join(names[:4]) + (f", and {len(names) - 4} more" if len(names) > 4 else "")
                lines.append(f"{len(names)} {title}: {reason} ({shown})")
        return "\n  ".join(lines)
