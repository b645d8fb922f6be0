"""The optimizers whose steps are measured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from baselines import BaselineFactory
from baselines.composite import Composite
from baselines.factory import baseline_layers, split
from hf_fngd import FNGD, FNGDPreconditioner

MATRICES = ["linear", "conv1d"]  # layer types
SGD, ADAMW, TORCH_MUON = "SGD-m", "AdamW, fused", "torch Muon + AdamW"
YARDSTICKS = (SGD, ADAMW)  # what ratios are to; they are always measured


def sgd(model: nn.Module) -> Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, foreach=True)


def adamw(model: nn.Module) -> Optimizer:
    """AdamW, as Trainer builds it."""
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


def torch_muon(model: nn.Module) -> Optimizer:
    """Muon as torch has it, in bfloat16 on any device, with AdamW on what is no matrix of a hidden layer."""
    matrices, rest = split(model, list(baseline_layers(model).values()), weight_decay=0.0)
    muon = torch.optim.Muon(matrices, lr=1e-5, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return Composite(TORCH_MUON, [muon, torch.optim.AdamW(rest, lr=1e-5, fused=True)])


def engine(model: nn.Module, **arguments: Any) -> Optimizer:
    """The preconditioner in front of SGD; as an attribute of it, as FNGD has it."""
    optimizer = sgd(model)
    optimizer.preconditioner = FNGDPreconditioner(model, **arguments)
    optimizer.preconditioner.follow(optimizer)
    return optimizer


def fngd(model: nn.Module, **arguments: Any) -> Optimizer:
    """The whole optimizer."""
    return FNGD(model, lr=1e-5, **arguments)


def baseline(model: nn.Module, name: str) -> Optimizer:
    """A baseline of `recipes/translate.py`, with its default periods."""
    return BaselineFactory()(model, name=name, lr=1e-5)


ARMS: dict[str, Callable[[nn.Module], Optimizer]] = {
    SGD: sgd,
    ADAMW: adamw,
    "engine + SGD-m, clipped": engine,
    "engine + SGD-m, replay, shared step": partial(engine, sharing="replay", coefficient_steps=1),
    "engine + SGD-m, never (a coefficient step)": partial(engine, sharing="never"),
    "FNGD block_muon, clipped (the default)": fngd,
    "FNGD block_muon, w = 1": partial(fngd, sharing="uniform"),
    "FNGD block_muon, clipped in linear layers alone": partial(fngd, layer_types=MATRICES),
    "FNGD muon, clipped": partial(fngd, update="muon"),
    "FNGD muon, w = 1": partial(fngd, update="muon", sharing="uniform"),
    "FNGD adam, clipped": partial(fngd, update="adam"),
    "FNGD adam, w = 1": partial(fngd, update="adam", sharing="uniform"),
    "FNGD adam, never (NGD)": partial(fngd, update="adam", sharing="never"),
    "FNGD momentum, replay, shared step": partial(fngd, update="momentum", sharing="replay", coefficient_steps=1),
    TORCH_MUON: torch_muon,
    "Muon": partial(baseline, name="muon"),
    "Eva": partial(baseline, name="eva"),
    "KFAC, 10/100": partial(baseline, name="kfac"),
    "KFAC, by eigenvalues, 10/100": partial(baseline, name="kfac_eigen"),
    "Shampoo, 10/100": partial(baseline, name="shampoo"),
    "SOAP": partial(baseline, name="soap"),
}


def available(names: Iterable[str], images: bool = False) -> list[str]:
    """The yardsticks and these arms, without torch's Muon where torch has none, and for images: it takes no filters."""
    chosen = [name for name in dict.fromkeys([*YARDSTICKS, *names]) if not (images and name == TORCH_MUON)]
    if TORCH_MUON in chosen and not hasattr(torch.optim, "Muon"):
        chosen.remove(TORCH_MUON)
        print(
            f"{TORCH_MUON} is left out: torch {torch.__version__} has no torch.optim.Muon, which came with 2.9",
            file=sys.stderr,
        )
    return chosen
