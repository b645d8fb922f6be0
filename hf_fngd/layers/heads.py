"""Output heads: the layers that make logits, whose weights have a row for each class or token.

Update rules for matrices are for what maps features to features. Rows of a head belong to one class or token each, as
those of an embedding do.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

# Of models that transformers knows nothing about: torchvision's, timm's, and those that name theirs as transformers do.
_NAMES = ("lm_head", "classifier", "score", "head", "fc")


def output_heads(model: nn.Module) -> set[int]:
    """The ``id`` of each parameter of an output head.

    In models of transformers, wrapped ones and parts of others included, a head is what ``get_output_embeddings`` says,
    and each layer outside the base model that has as many outputs as the config has labels or tokens. In other models
    it is a Linear, or the last one of a Sequential, that is a child of the model itself and called "lm_head",
    "classifier", "score", "head" or "fc".
    """
    pretrained = [module for module in model.modules() if _is_pretrained(module)]
    heads = [head for module in pretrained for head in _of_pretrained(module)]
    if not pretrained:
        children = [child for name, child in model.named_children() if name in _NAMES]
        heads = [module for child in children for module in list(child.modules())[-1:] if isinstance(module, nn.Linear)]
    return {id(parameter) for head in heads for parameter in head.parameters(recurse=False)}


def _is_pretrained(module: nn.Module) -> bool:
    return all(hasattr(type(module), name) for name in ("get_output_embeddings", "base_model_prefix"))


def _of_pretrained(model: Any) -> Iterator[nn.Module]:
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):  # of a model without one
        head = None
    if isinstance(head, nn.Module):
        yield head
    config = model.config
    sizes = {getattr(config, name, None) for name in ("num_labels", "vocab_size")} - {None, 0}
    base = {id(module) for module in model.base_model.modules()}
    for module in model.modules():
        outputs = getattr(module, "out_features", getattr(module, "nf", None))  # Linear, Conv1D
        if id(module) not in base and isinstance(getattr(module, "weight", None), nn.Parameter) and outputs in sizes:
            yield module
