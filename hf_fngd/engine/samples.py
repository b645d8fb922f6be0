"""When the probe of `hf_fngd.engine.probe` runs, what it tells the layers, and what stands in for it."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from hf_fngd.engine.layer import Layer
from hf_fngd.engine.probe import Calls, digest, probe
from hf_fngd.engine.window import in_backward
from hf_fngd.layers.base import View
from hf_fngd.layers.embedding import EmbeddingKernel

logger = logging.getLogger(__name__)


class Samples:
    """Where the samples are: in which dimension ``dim`` of the model's inputs, and in which view of its layers'.

    The probe runs once, before the first training forward pass of the model. Where it cannot, sizes tell, and ``note``
    says why.
    """

    def __init__(self, layers: Sequence[Layer], batch_dim: int | None) -> None:
        self.dim, self.note = batch_dim or 0, ""
        self.probed = False
        self.seen: Calls | None = None  # what the layers see, while a probe is under way
        self._layers, self._batch_dim = layers, batch_dim

    def told(self) -> str:
        """The note."""
        return self.note

    def see(self, layer: Layer, inputs: Sequence[Any]) -> None:
        """A layer is called in a probe."""
        if self.seen is not None and inputs and isinstance(inputs[0], Tensor):
            self.seen.setdefault(layer.place, []).append(digest(inputs[0]))

    def probe(
        self,
        model: nn.Module,
        own: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        sample: Tensor,
    ) -> None:
        """Before the first training forward pass, with these arguments."""
        if in_backward() or not len(sample):
            return
        self.probed = True
        reason = _obstacle(model)
        if reason is None:
            try:
                found = probe(model, self._run(own), (args, dict(kwargs)), sample, self._batch_dim)
            except Exception as error:  # whatever a model does with a batch that is not its trainer's
                text = " ".join(str(error).split())[:200]
                reason = f"a forward pass on a batch of another size failed ({type(error).__name__}: {text})"
            else:
                self.dim = found.dim
                for layer in self._layers:
                    if layer.place in found.verdicts:
                        layer.told(found.verdicts[layer.place])
                return
            finally:
                self.seen = None
        self.note = f"which rows are whose sample was told by sizes alone, as {reason}"
        if self._batch_dim is None:
            self.note += "; batch_dim=0 or 1 says it for sure"
        else:
            for layer in self._layers:
                if not isinstance(layer.kernel, EmbeddingKernel):
                    layer.told(View(self._batch_dim, "last" if self._batch_dim else "one"))
        logger.info("%s", self.note)

    def _run(self, own: Callable[..., Any]) -> Callable[[Any, Any], Calls]:
        def run(args: Any, kwargs: Any) -> Calls:
            seen: Calls = {}
            self.seen = seen
            own(*args, **kwargs)
            return seen

        return run


def _obstacle(model: nn.Module) -> str | None:
    """Why the model must not run more often than its trainer says; None where it may."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            return "FSDP2 exchanges parameters in every forward pass"
        if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
            return "a part of the model is compiled"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is under way"
    return None
