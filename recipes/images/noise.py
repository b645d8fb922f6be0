"""Wrong labels, drawn from a confusion matrix: row `c` holds the shares of the labels that class `c` is given."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_ROUNDING = 0.01  # of a row's sum


def uniform_rates(classes: int, share: float) -> Tensor:
    """Return the matrix that replaces a share of the labels by uniformly random ones, some right by chance."""
    return (1 - share) * torch.eye(classes, dtype=torch.float64) + share / classes


def read_rates(path: str | Path, kind: str, names: Sequence[str] | None, classes: int) -> Tensor:
    """Read a matrix from a JSON file.

    Args:
        path: The file: matrices by name, and as `classes`, if it is there, the order of rows and columns.
        kind: Name of the matrix.
        names: Names of the dataset's classes, in the order of its labels; None where they have none.
        classes: Number of classes.

    Returns:
        The matrix `[classes, classes]` in float64, with rows of sum 1.

    Raises:
        ValueError: The file is no JSON, or holds no such matrix, or one of the wrong shape, or of other classes.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}; it must hold matrices by name.")
    kinds = [key for key, value in found.items() if key != "classes" and isinstance(value, list)]
    if kind not in kinds:
        raise ValueError(f"{path} has no matrix {kind!r}; set --noise_kind to {' or '.join(kinds)}.")
    order = found.get("classes")
    if order is not None and names is not None and list(order) != list(names):
        raise ValueError(f"{path} is about the classes {order}, the dataset has {list(names)}.")
    try:
        rates = torch.tensor(found[kind], dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{kind} in {path} is no matrix of numbers: {error}") from error
    if rates.shape != (classes, classes):
        raise ValueError(f"{kind} in {path} has the shape {tuple(rates.shape)}; the dataset has {classes} classes.")
    sums = rates.sum(dim=1, keepdim=True)
    if not (rates >= 0).all() or not ((sums - 1).abs() <= _ROUNDING).all():
        raise ValueError(f"Each row of {kind} in {path} must hold shares that add up to 1.")
    return rates / sums


def corrupt(labels: Tensor, rates: Tensor, seed: int) -> Tensor:
    """Draw the label that each sample is given.

    Args:
        labels: True labels `[n]`.
        rates: Matrix `[classes, classes]`.
        seed: Seed of the draw, which touches no other generator.

    Returns:
        Given labels `[n]`.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(rates[labels], 1, generator=generator).squeeze(1)
