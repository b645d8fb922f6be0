"""Parameters of preconditioned layers that update rules for matrices leave to the fallback rule.

Rules for matrices suit a map from features to features. A row of an output head belongs to one class or token, as a row
of an embedding does. A depthwise filter mixes no features.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from hf_fngd.layers.convolution import CONVOLUTIONS
from hf_fngd.updates.base import ADAPTER

# What models call an output head that is a child of their own, torchvision's and timm's included.
_NAMES = ("lm_head", "classifier", "score", "head", "fc")
# The same in models of transformers whose heads have other numbers of outputs than the config has labels and tokens, or
# where no attribute is the base model.
_NAMES_OF_PRETRAINED = (*_NAMES, "qa_outputs", "ctc_head", "class_labels_classifier", "class_predictor")


def output_heads(model: nn.Module) -> set[int]:
    """The ``id`` of each parameter of an output head.

    In models of transformers, wrapped ones and parts of others included, a head is what ``get_output_embeddings`` says,
    each layer outside the base model that has as many outputs as the config has labels or tokens, and a child with the
    name of a head. In other models, which may have one of transformers within, it is a Linear or a convolution, or the
    last one of a Sequential, that is a child of the model itself and called "lm_head", "classifier", "score", "head" or
    "fc". Of an adapter on a head B belongs to it.
    """
    pretrained = [module for module in model.modules() if _is_pretrained(module)]
    heads = [head for module in pretrained for head in _of_pretrained(module)]
    if not _is_pretrained(model):
        children = [child for name, child in model.named_children() if name in _NAMES]
        last = [module for child in children for module in list(child.modules())[-1:]]
        heads += [module for module in last if isinstance(module, (nn.Linear, *CONVOLUTIONS))]
    return _parameters(heads)


def depthwise_filters(model: nn.Module) -> set[int]:
    """The ``id`` of each parameter of a convolution with one input channel in each of its groups."""
    convolutions = (module for module in model.modules() if isinstance(module, CONVOLUTIONS))
    return _parameters(one for one in convolutions if one.in_channels == one.groups > 1)


def _parameters(modules: Iterable[nn.Module]) -> set[int]:
    return {id(parameter) for module in modules for parameter in module.parameters(recurse=False)}


def _is_pretrained(module: nn.Module) -> bool:
    return all(hasattr(type(module), name) for name in ("get_output_embeddings", "base_model_prefix"))


def _of_pretrained(model: Any) -> Iterator[nn.Module]:
    called = [child for name, child in model.named_children() if name in _NAMES_OF_PRETRAINED]
    known = [head for head in (model.get_output_embeddings(), *called) if isinstance(head, nn.Module)]
    # PEFT puts a head, and what it trains in its place, into a wrapper that has the head's number of outputs.
    within = {id(module): size for head in known if (size := _outputs(head)) for module in head.modules()}
    sizes = {getattr(model.config, name, None) for name in ("num_labels", "vocab_size")} - {None, 0}
    base = {id(module) for module in model.base_model.modules()}
    for name, module in model.named_modules():
        adapter = ADAPTER.search(f"{name}.weight")
        maps_to_features = adapter is not None and adapter[1] in "aA"
        if maps_to_features or not isinstance(getattr(module, "weight", None), nn.Parameter):
            continue
        outputs = _outputs(module)
        if outputs is not None and (outputs == within.get(id(module)) or (id(module) not in base and outputs in sizes)):
            yield module


def _outputs(module: Any) -> int | None:
    """How many outputs a Linear, Conv1D or convolution has, or what wraps one; None for any other module."""
    sizes = (getattr(module, name, None) for name in ("out_features", "nf", "out_channels"))
    return next((size for size in sizes if isinstance(size, int)), None)
