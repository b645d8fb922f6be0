"""From a baseline's name to an optimizer of the whole model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from baselines.composite import Composite
from baselines.eva import Eva
from baselines.kfac import KFAC, EigenKFAC
from baselines.muon import Muon
from baselines.shampoo import Shampoo
from hf_fngd.updates.groups import decays
from hf_fngd.updates.heads import output_heads


@dataclass(frozen=True)
class Baseline:
    """A rule for matrices.

    Attributes:
        title: The name to report.
        build: Takes parameter groups, the layers that own their matrices, and the options; returns the optimizer.
        options: The options of `recipes/translate.py` that it has a use for.
        ends: Whether it takes classifiers and the first convolution; where it does not, its authors leave them to
            AdamW.
    """

    title: str
    build: Callable[..., Optimizer]
    options: tuple[str, ...]
    ends: bool = True


def _soap(groups: list[dict[str, Any]], layers: Sequence[nn.Module], **options: Any) -> Optimizer:
    """SOAP (Vyas et al. 2024) of pytorch-optimizer; like its authors', it makes no update in the first step."""
    from pytorch_optimizer import SOAP  # a library of a hundred optimizers, for this one alone

    if "beta2" in options:
        options["betas"] = (0.95, options.pop("beta2"))
    if "inverse_every" in options:
        options["precondition_frequency"] = options.pop("inverse_every")
    return SOAP(groups, **options)


def _without_layers(cls: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    return lambda groups, layers, **options: cls(groups, **options)


BASELINES: dict[str, Baseline] = {
    "muon": Baseline("Muon", _without_layers(Muon), ("momentum",), ends=False),
    "soap": Baseline("SOAP", _soap, ("beta2", "eps", "inverse_every")),
    "shampoo": Baseline(
        "Shampoo", _without_layers(Shampoo), ("momentum", "beta2", "eps", "statistics_every", "inverse_every")
    ),
    "kfac": Baseline("KFAC", KFAC, ("momentum", "damping", "kl_clip", "statistics_every", "inverse_every")),
    "kfac_eigen": Baseline(
        "KFAC, by eigenvalues", EigenKFAC, ("momentum", "damping", "kl_clip", "statistics_every", "inverse_every")
    ),
    "eva": Baseline("Eva", Eva, ("momentum", "damping", "kl_clip", "statistics_every")),
}


class BaselineFactory:
    """For `Trainer(optimizer_cls_and_kwargs=(BaselineFactory, {"name": ..., "lr": ...}))`."""

    def __call__(
        self,
        model: nn.Module,
        *,
        name: str,
        lr: float,
        weight_decay: float = 0.0,
        rest_betas: tuple[float, float] = (0.9, 0.999),
        rest_eps: float = 1e-8,
        fallback_lr: float | None = None,
        **options: Any,
    ) -> Composite:
        """Build the optimizer.

        Args:
            model: The model to train.
            name: A key of `BASELINES`.
            lr: Learning rate, of all parameters unless fallback_lr is given.
            weight_decay: Decoupled decay; by the Trainer's own rule not of biases and norms.
            rest_betas: AdamW's, on the parameters that the rule leaves out.
            rest_eps: AdamW's, there.
            fallback_lr: AdamW's learning rate, there: KFAC's and Eva's own is in another unit.
            **options: Of the baseline, by the names of its `options`.

        Raises:
            ValueError: No such baseline, or an option that it has no use for.
        """
        if name not in BASELINES:
            raise ValueError(f"{name!r} is no baseline; there are {', '.join(BASELINES)}.")
        baseline = BASELINES[name]
        useless = [option for option in options if option not in baseline.options]
        if useless:
            raise ValueError(f"{name} has no use for {', '.join(useless)}; it takes {', '.join(baseline.options)}.")
        layers = [*baseline_layers(model).values()]
        if not baseline.ends:
            first = next((layer for layer in layers if isinstance(layer, nn.Conv2d)), None)
            heads = output_heads(model)
            layers = [layer for layer in layers if layer is not first and id(layer.weight) not in heads]
        if not layers:
            raise ValueError(
                f"{baseline.title} has nothing to step: all trained matrices are of the first or last layer."
            )
        matrices, rest = split(model, layers, weight_decay)
        optimizers = [baseline.build(matrices, layers, lr=lr, **options)]
        if rest:
            rate = lr if fallback_lr is None else fallback_lr
            optimizers.append(AdamW(rest, lr=rate, betas=rest_betas, eps=rest_eps, fused=True))
        return Composite(baseline.title, optimizers)


def baseline_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return by their names the layers whose matrices get a baseline's rule: every Linear, Conv1D and Conv2d.

    The one that yields the scores of a vocabulary is left out, and so are subclasses, which may compute something else,
    and convolutions in groups. A filter `[o, i, k, k]` is the matrix `[o, i k k]`, but to SOAP, which has a basis for
    each of its dimensions.

    Raises:
        ValueError: Nothing is left.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D, nn.Conv2d)
        and getattr(module, "groups", 1) == 1
        and module is not head
        and module.weight.requires_grad
    }
    if not layers:
        raise ValueError("The model has no Linear beside that of its output vocabulary: nothing to precondition.")
    return layers


def split(
    model: nn.Module, layers: Sequence[nn.Module], weight_decay: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the groups of the layers' weights and those of all other trained parameters, decayed ones first."""
    weights = {id(layer.weight) for layer in layers}
    decayed = decays(model)
    groups: defaultdict[tuple[bool, bool], list[torch.Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[id(parameter) in weights, name in decayed].append(parameter)
    matrices: list[dict[str, Any]] = []
    rest: list[dict[str, Any]] = []
    for matrix, decay in sorted(groups, reverse=True):
        group = {"params": groups[matrix, decay], "weight_decay": weight_decay if decay else 0.0}
        (matrices if matrix else rest).append(group)
    return matrices, rest
