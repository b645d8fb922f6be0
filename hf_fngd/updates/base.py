"""What an update rule is given, and the registry that names the rules: one file and one `register_rule` each."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from hf_fngd.checks import NOT_NEGATIVE, choice
from hf_fngd.layers.base import Matrices


@dataclass(frozen=True)
class Update:
    """One update of one parameter group; a rule does it in place, by multi-tensor operations."""

    params: list[Tensor]  # under FSDP2 this process's parts of ``sharded``, otherwise the same tensors
    grads: list[Tensor]
    state: Sequence[list[Tensor]]  # one list for each name of the rule, shaped like ``params``
    steps: Sequence[int]  # counts each parameter's updates, this one included
    sharded: Sequence[Tensor]  # the parameters themselves
    matrices: Sequence[Matrices]  # what each parameter consists of, for rules for matrices
    group: dict[
        str, Any
    ]  # a rule reads ``lr``, ``momentum`` and ``weight_decay`` in it, and what it is registered with
    replicas: ProcessGroup | None = None  # the processes that do the same update, and can share its work

    def decay(self) -> None:
        """Do the decoupled weight decay ``p <- p (1 - lr weight_decay)`` (Loshchilov & Hutter 2019)."""
        if self.group["weight_decay"]:
            torch._foreach_mul_(self.params, 1 - self.group["lr"] * self.group["weight_decay"])


Rule = Callable[[Update], None]


class UpdateRule(NamedTuple):
    """One entry of the registry; see `register_rule`."""

    update: Rule
    state: tuple[str, ...]
    reads: tuple[str, ...]
    matrices: bool
    over_adamw: float


RULES: dict[str, UpdateRule] = {}

RATE, RATE_OF_ADAPTERS = 1e-3, 3e-3
"""What ``lr=None`` stands for, in a model whose own weights are trained, and in one that trains LoRA adapters."""

ADAPTER = re.compile(r"(?:^|\.)lora_([ab])(?:\.[^.]+)?\.weight$", re.IGNORECASE)
"""Names of the weights of LoRA's two matrices, A and B, in PEFT and torchtune."""


def register_rule(
    name: str, *state: str, reads: Sequence[str] = (), matrices: bool = False, over_adamw: float = 1.0
) -> Callable[[Rule], Rule]:
    """Function decorator: make an update rule available by its name, with the names of its state tensors.

    ``reads`` are those of the arguments beta2, eps, block_size and ns_steps that it finds in `Update.group`. If it is
    for ``matrices`` alone, the biases beside them get "adam". ``over_adamw`` is its best learning rate divided by
    AdamW's (`learning_rate_from_adamw`). Raises ValueError where the name is taken.
    """

    def register(rule: Rule) -> Rule:
        if name in RULES:
            raise ValueError(f"there is already an update rule named {name!r}")
        RULES[name] = UpdateRule(rule, state, tuple(reads), matrices, over_adamw)
        return rule

    return register


def default_learning_rate(model: nn.Module, update: str) -> float:
    """What ``lr=None`` means: `RATE_OF_ADAPTERS` where a rule for matrices moves LoRA's, otherwise `RATE`.

    LoRA's go by the names that PEFT and torchtune give the Linear or convolution, ``lora_A`` and ``lora_B``; AdaLoRA's
    are parameters of these names, which no such rule moves.
    """
    adapters = any(p.requires_grad and ADAPTER.search(name) for name, p in model.named_parameters())
    return RATE_OF_ADAPTERS if adapters and RULES[update].matrices else RATE


def learning_rate_from_adamw(lr: float, update: str = "block_muon") -> float:
    """A learning rate to begin with, for a model that AdamW trains well at ``lr``.

    It is a multiple of ``lr``: twice for "block_muon" and "muon", once for "adam", a tenth for "momentum", once for a
    rule that is registered without ``over_adamw``. On the tasks of docs/choosing_settings.md the best learning rate of
    "block_muon" was 0.5 to 30 times AdamW's (geometric mean: 2.4); so try half of it, and two and five times. For a
    pretrained model begin at ``lr`` itself, and try half of that and three times that.

    Raises:
        TypeError: ``lr`` is no number, or ``update`` no name.
        ValueError: ``lr`` is negative or not finite, or there is no such update rule.
    """
    lr = NOT_NEGATIVE("lr", lr)
    return lr * RULES[choice(RULES)("update", update)].over_adamw
