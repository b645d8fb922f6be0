"""The signature that all update rules share, and the registry that names them.

A rule is one file with one function and one `register_rule`. The function updates ``params`` and its state in place, by
multi-tensor operations, with decoupled weight decay (Loshchilov & Hutter 2019): ``p <- p (1 - lr weight_decay)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Tensors = list[Tensor]


@dataclass(frozen=True)
class Hyperparameters:
    """What a parameter group says of its rule; each rule reads what it needs."""

    lr: float
    momentum: float
    beta2: float
    eps: float
    weight_decay: float


class Rule(Protocol):
    """One update of a parameter group."""

    def __call__(
        self,
        params: Tensors,
        grads: Tensors,
        state: Sequence[Tensors],
        steps: Sequence[int],
        group: Hyperparameters,
        sharded: Sequence[Tensor],
        /,
    ) -> None:
        """Update in place.

        Args:
            params: this process's parts of ``sharded`` under FSDP2, otherwise the same as those.
            grads: their gradients.
            state: one list of tensors for each name of the rule.
            steps: counts each parameter's updates, this one included.
            group: the group's hyperparameters.
            sharded: the parameters themselves.
        """


@dataclass(frozen=True)
class UpdateRule:
    """A rule and the names of the state tensors, shaped like the parameter, that it wants."""

    update: Rule
    state: tuple[str, ...]


RULES: dict[str, UpdateRule] = {}
"""The registered rules by name."""


def register_rule(name: str, *state: str) -> Callable[[Rule], Rule]:
    """Function decorator: make an update rule available by its name.

    Args:
        name: what a parameter group's ``rule`` calls it.
        state: names of its state tensors.

    Raises:
        ValueError: the name is taken.
    """

    def register(rule: Rule) -> Rule:
        if name in RULES:
            raise ValueError(f"there is already an update rule named {name!r}")
        RULES[name] = UpdateRule(rule, state)
        return rule

    return register


def decay(params: Tensors, group: Hyperparameters) -> None:
    """Decoupled weight decay."""
    if group.weight_decay:
        torch._foreach_mul_(params, 1 - group.lr * group.weight_decay)
