"""When the probe of `hf_fngd.samples.probe` runs, what the layers learn from it, and what serves in its place."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from hf_fngd.engine.coverage import listed
from hf_fngd.engine.layer import Layer
from hf_fngd.engine.window import in_backward
from hf_fngd.samples.inputs import sizes_of
from hf_fngd.samples.probe import Calls, digest, is_coarse, probe
from hf_fngd.samples.rows import Shares, View

TOLD_BY_SIZES = "which rows are whose sample was told by sizes alone"


class Probing:
    """Finds out where the samples are: the dimension ``dim`` of the model's inputs, and the view of each layer's input.

    The probe runs before the first training forward pass. Where it fails, or finds a layer whose samples cannot be
    told apart, it runs again before the next passes, three times in all: the first batch may have been an odd one.
    Where it cannot run at all, the sizes of tensors have to do, and ``note`` says why.
    """

    PROBES = 3

    def __init__(self, layers: Sequence[Layer], batch_dim: int | None) -> None:
        self.dim, self.note = batch_dim or 0, ""
        self.left = self.PROBES  # how often it may run
        self._found: int | None = None  # the dimension that a probe found
        self._settled = False  # whether a probe, or the argument in its place, has told the layers
        self.seen: Calls | None = None  # what the layers see, while a probe is under way
        self._coarse = False  # whether the model `is_coarse`
        self._layers, self._batch_dim = layers, batch_dim
        self._taken = ""  # the input that counts the samples, in words

    def sizes(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], samples: int) -> dict[str, frozenset[int]]:
        """The sizes of the model's inputs, if the shares of a layer depend on them; else nothing."""
        shares = any(layer.shares is not None for layer in self._layers)
        return sizes_of((args, kwargs), samples, self.dim) if shares else {}

    def told(self) -> str:
        """The note for the coverage report; where a probe ran, it names the layers that the probe did not reach."""
        if self.note:
            return self.note
        names = [layer.selected.parameters[0] for layer in self._layers if layer.by_sizes]
        if not names:
            return ""
        return f"{TOLD_BY_SIZES} for {listed(names)}, as the probe, in evaluation mode, did not tell"

    def see(self, layer: Layer, inputs: Sequence[Any]) -> None:
        """A layer is called in a probe."""
        if self.seen is not None and inputs and isinstance(inputs[0], Tensor):
            self.seen.setdefault(layer.place, []).append(digest(inputs[0], self._coarse))

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a frame that the compiler gave up may be traced later
    def probe(
        self,
        model: nn.Module,
        own: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        sample: Tensor,
    ) -> None:
        """Run the probe before a training forward pass with these arguments, and tell the layers what it found."""
        if in_backward() or not len(sample):
            return
        self.left -= 1
        self._coarse = is_coarse(model)
        reason = obstacle(model)
        key = next((repr(key) for key, value in kwargs.items() if value is sample), "the first tensor")
        self._taken = f"{key} {[*sample.shape]}"
        if reason is None:
            try:
                inputs = (args, dict(kwargs))
                found = probe(model, self._run(own), inputs, sample, self._batch_dim, self._found, own)
            except Exception as error:  # whatever a model does with a batch that is not its trainer's
                reason = f"a forward pass on a batch of another size failed ({shown(error)})"
            else:
                self.note, self._settled = "", True
                self.dim = found.dim
                if any(isinstance(one, View) for one in found.verdicts.values()):
                    self._found = found.dim
                sizes = sizes_of(inputs, sample.shape[found.dim], found.dim) if found.shares else {}
                for layer in self._layers:
                    if layer.place in found.verdicts:
                        layer.told(found.verdicts[layer.place])
                        layer.probed = found.calls[layer.place]
                    if layer.view is not None and layer.place in found.shares and layer.shares is None:
                        layer.shares = Shares(found.shares[layer.place], sizes)
                if all(layer.unfit is None or layer.left_out for layer in self._layers):
                    self.left = 0
                return
            finally:
                self.seen = None
        else:
            self.left = 0
        self.fail(reason)

    def fail(self, reason: str) -> None:
        """No probe could run, for this reason: the argument ``batch_dim`` decides, or else the sizes of tensors."""
        if self._found is not None:
            return
        self.note = f"{TOLD_BY_SIZES}, as {reason}"
        if self._taken:
            self.note += f"; {self._taken} was taken for the batch"
        if self._batch_dim is None:
            self.note += "; batch_dim=0 or 1 says which of its dimensions counts the samples"
        self.settle()

    def settle(self) -> None:
        """Without a probe: go by the argument ``batch_dim``, if it was given."""
        if self._batch_dim is None or self._settled:
            return
        self._settled = True
        for layer in self._layers:
            if not layer.kernel.finds_samples:
                layer.told(View(self._batch_dim, "last" if self._batch_dim else "one"))
        self.left = 0

    def _run(self, own: Callable[..., Any]) -> Callable[[Any, Any], Calls]:
        def run(args: Any, kwargs: Any) -> Calls:
            seen: Calls = {}
            self.seen = seen
            own(*args, **kwargs)
            return seen

        return run


def shown(error: Exception) -> str:
    """The kind of an error and the beginning of its text, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def obstacle(model: nn.Module) -> str | None:
    """Why the model must not run a pass more than its user asked for; None where it may."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            return "FSDP2 exchanges parameters in every forward pass"
        compiled = module._compiled_call_impl is not None and module is not model  # whose own forward is eager
        if compiled or hasattr(module, "_orig_mod"):
            return "a part of the model is compiled"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is under way"
    return None
