"""Attaching to a model: an instance's class is swapped for a generated subclass with another ``forward``.

The subclass has its base's name, keeps its state in the instance's ``__dict__``, and pickles and copies as its base.
So ``state_dict`` keys, ``repr``, ``save_pretrained`` and pickles are those of the plain model.

The other ways fall short. A function on ``module.forward`` does not pickle, and a copy of it trains the original. A
parametrization renames keys. A backward hook comes after the weight gradient was paid for. A forward pre-hook misses
the wrappers that call ``forward`` themselves.

If somebody puts another forward on the model's instance, before or after, it too goes through the model's handler. TRL
does so after the optimizer was built; its forward computes the output in its own way and calls no earlier one.
"""

import copyreg
import functools
import inspect
import weakref
from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from hf_fngd.layers.modules import PLAIN_CLASS, is_frozen
from hf_fngd.samples.ids import COLUMN
from hf_fngd.stack import callers

Handler = Callable[..., Any]
_LAYER = "_fngd_layer"
_MODEL = "_fngd_model"
# The functions that `_sent` made, and whether each stands for a method of the model. An attribute would not do, since
# functools.wraps copies it to wrappers.
_sent_functions: "weakref.WeakKeyDictionary[Any, bool]" = weakref.WeakKeyDictionary()


class Attachment:
    """Sends the forwards of a model and of some of its layers through handlers; it keeps no module alive.

    A handler is called as ``handler(module, own_forward, *args, **kwargs)``. A frozen layer is left as it is if it is
    attached already, or if its forward was replaced on the instance.

    Raises RuntimeError where a module cannot be attached; the model is then unchanged.
    """

    def __init__(self, model: nn.Module, handler: Handler, layers: Sequence[tuple[nn.Module, Handler]]) -> None:
        layers = [(layer, layer_handler) for layer, layer_handler in layers if not _is_left(layer)]
        self._swapped = [(weakref.ref(model), _MODEL, handler)]
        self._swapped += [(weakref.ref(layer), _LAYER, layer_handler) for layer, layer_handler in layers]
        try:
            for layer, layer_handler in layers:
                _swap(layer, _LAYER, layer_handler)
            _swap(model, _MODEL, handler)
        except RuntimeError:
            self.undo()
            raise

    @property
    def active(self) -> bool:
        """Whether `undo` is still to come, by this object or by `detach`."""
        modules = ((reference(), attribute, handler) for reference, attribute, handler in self._swapped)
        return any(module is not None and module.__dict__.get(of) is handler for module, of, handler in modules)

    def refuse_left(self, module: nn.Module) -> None:
        """Raise RuntimeError for a layer that was left as it is because it was frozen."""
        if "forward" in module.__dict__:
            raise _replaced(module)
        if not any(module.__dict__.get(_LAYER) is handler for _, _, handler in self._swapped):
            raise _attached("frozen layer that was unfrozen")

    def undo(self) -> None:
        """Give back the forwards that are still sent through these handlers; idempotent."""
        while self._swapped:
            reference, attribute, handler = self._swapped.pop(0)
            module = reference()
            if module is not None and module.__dict__.get(attribute) is handler:
                _restore(module, attribute)


def detach(model: nn.Module) -> None:
    """Restore a model that an `FNGDPreconditioner` or an `FNGD` was built on; any other model stays as it is."""
    for attribute in (_MODEL, _LAYER):
        for module in model.modules():
            if attribute in module.__dict__:
                _restore(module, attribute)


def unsupported(by: str) -> RuntimeError:
    """The error for a tool (named by ``by``) that takes a model apart in a way that no handler can follow."""
    return RuntimeError(
        f"{by} does not work on a model that FNGD is attached to: give it copy.deepcopy(model), which is a plain "
        "model, or call hf_fngd.detach(model) first"
    )


def refuse_attached(model: nn.Module) -> None:
    """Raise RuntimeError where a module of the model is attached already, before anything is swapped.

    Frozen layers may be: two models can share a frozen encoder.
    """
    for name, module in model.named_modules():
        if _MODEL in module.__dict__ or (_LAYER in module.__dict__ and not is_frozen(module)):
            raise _attached(f"module {name!r}" if name else "model")


def _attached(what: str) -> RuntimeError:
    return RuntimeError(f"the {what} is attached to another FNGD already; call hf_fngd.detach(model) first")


def _swap(module: nn.Module, attribute: str, handler: Handler) -> None:
    """Send a module's forward through a handler, which that attribute of the instance's ``__dict__`` keeps.

    A ``forward`` that somebody put on the model's instance is sent as well; on a layer's it raises RuntimeError.
    """
    replaced = module.__dict__.get("forward")
    if replaced is not None and attribute == _LAYER:
        raise _replaced(module)
    module.__dict__[attribute] = handler
    plain: Any = type(module)
    if replaced is not None:
        module.__dict__["forward"] = _sent(module, replaced)
    if any(base.__dict__.get("_fngd_attribute") == attribute for base in plain.__mro__):
        return  # an earlier subclass, which `_restore` could not remove, will find the handler
    module.__class__ = _subclass(plain, attribute)


def _is_left(layer: nn.Module) -> bool:
    return is_frozen(layer) and (_LAYER in layer.__dict__ or "forward" in layer.__dict__)


def _replaced(module: nn.Module) -> RuntimeError:
    return RuntimeError(
        f"the forward of this {type(module).__name__} was replaced on the instance (Accelerate does so when it "
        "prepares a model for mixed precision or spreads it over devices), which would pass FNGD by: build FNGD "
        "before the model is prepared, as in Trainer(optimizers=(FNGD(model), scheduler)), and load the model "
        "without a device_map of several devices"
    )


def _restore(module: nn.Module, attribute: str) -> None:
    """Undo `_swap`. The module is what it was, except that a forward it was given meanwhile stays."""
    del module.__dict__[attribute]
    if "forward" in module.__dict__:
        module.__dict__["forward"] = _unsent(module.__dict__["forward"])
    if type(module).__dict__.get("_fngd_attribute") == attribute:  # FSDP2 puts a class of its own on top
        module.__class__ = type(module).__mro__[1]


def _sent(module: nn.Module, replaced: Any) -> Any:
    """A method that sends a forward of the model's instance through the handler while there is one."""
    if _unsent(replaced) is not replaced or not callable(replaced):
        return replaced
    bound = isinstance(replaced, MethodType) and replaced.__self__ is module  # else a copy would train the original
    plain = replaced.__func__ if bound else replaced

    @functools.wraps(plain)  # Accelerate goes along __wrapped__, and makes a method of what it finds
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = functools.partial(plain, self) if bound else plain
        handler = self.__dict__.get(_MODEL)
        return own(*args, **kwargs) if handler is None else handler(self, own, *args, **kwargs)

    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    signature = _with_column(inspect.signature(replaced))
    parameters = [itself, *signature.parameters.values()]
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    _sent_functions[forward] = bound
    return MethodType(forward, module)


def _unsent(forward: Any) -> Any:
    """The forward that a method made by `_sent` stands for; any other forward unchanged."""
    function = forward.__func__ if isinstance(forward, MethodType) else None
    if not isinstance(function, FunctionType) or (bound := _sent_functions.get(function)) is None:
        return forward
    plain = function.__wrapped__  # type: ignore[attr-defined]
    return MethodType(plain, forward.__self__) if bound else plain


def _with_column(signature: inspect.Signature) -> inspect.Signature:
    """A model's signature with the column of sample ids; without it Trainer would drop the column."""
    if COLUMN in signature.parameters:
        return signature
    parameters = list(signature.parameters.values())
    place = next((n for n, one in enumerate(parameters) if one.kind is one.VAR_KEYWORD), len(parameters))
    parameters.insert(place, inspect.Parameter(COLUMN, inspect.Parameter.KEYWORD_ONLY, default=None))
    return signature.replace(parameters=parameters)


@functools.cache
def _subclass(base: Any, attribute: str) -> Any:
    plain = getattr(base, PLAIN_CLASS, base)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(args, tuple):  # torch.fx passes one proxy for all arguments
            raise unsupported("torch.fx.symbolic_trace")
        if attribute == _LAYER and (weight := self._parameters.get("weight")) is not None and not weight.requires_grad:
            return base.forward(self, *args, **kwargs)  # frozen, as most layers of an adapted model: costs nothing
        # Not a bound method: after a graph break torch.compile would look it up by name, and find this function.
        own = functools.partial(base.forward, self)
        handler = self.__dict__.get(attribute)
        return own(*args, **kwargs) if handler is None else handler(self, own, *args, **kwargs)

    signature = inspect.signature(base.forward)
    # Not functools.wraps: to unwrap a model accelerate follows __wrapped__, and would go past this function.
    forward.__signature__ = _with_column(signature) if attribute == _MODEL else signature  # type: ignore[attr-defined]
    forward.__doc__ = base.forward.__doc__

    def reduce(self: Any, protocol: Any) -> Any:
        state = {key: value for key, value in base.__reduce_ex__(self, 2)[2].items() if key != attribute}
        if "forward" in state:
            state["forward"] = _unsent(state["forward"])
        # Not copyreg.__newobj__, which requires the instance's present class.
        return copyreg._reconstructor, (plain, object, None), state  # type: ignore[attr-defined]

    def set_attribute(self: Any, name: str, value: Any) -> None:
        if name == "forward" and attribute in self.__dict__ and not isinstance(value, nn.Module):
            value = _sent(self, value)
        base.__setattr__(self, name, value)

    def script(self: Any) -> Any:
        raise unsupported("torch.jit.script")

    names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    own = {"__reduce_ex__": reduce, PLAIN_CLASS: plain, "_fngd_attribute": attribute, "forward": forward}
    own["__prepare_scriptable__"] = script  # torch.jit.script asks for it
    if attribute == _MODEL:
        own["__setattr__"] = set_attribute
    if attribute == _LAYER:
        own["qconfig"] = _QCONFIG
    return type(base.__name__, (base,), names | own)


def _get_qconfig(module: nn.Module) -> Any:
    try:
        return module.__dict__["qconfig"]
    except KeyError as error:
        raise AttributeError("qconfig") from error


def _set_qconfig(module: nn.Module, value: Any) -> None:
    for frame in callers():
        name = str(frame.f_globals.get("__name__"))
        if name != nn.Module.__module__:
            if name.startswith(("torch.ao.", "torchao.")):
                raise unsupported("Quantization in place")
            break
    module.__dict__["qconfig"] = value


# torch.ao.quantization sets qconfig on every module, then replaces modules by their `type`. An attached layer has
# another type and would silently be left out. Users also set qconfig, on a model that is then copied.
_QCONFIG = property(_get_qconfig, _set_qconfig, lambda module: module.__dict__.pop("qconfig"))
