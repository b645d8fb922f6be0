"""Attaching to a model: an instance's class is swapped for a generated subclass with another ``forward``.

The subclass goes by its base's name, its state lives in the instance's ``__dict__``, and it pickles and
deep-copies as the plain class: ``state_dict`` keys, ``repr``, ``save_pretrained`` and pickles are those of the
model as it was, and a copy is a plain model. (A function put on ``module.forward`` does not pickle, and its
deep copy trains the original; a parametrization renames keys; a backward hook comes after the weight gradient
has been paid for; a forward pre-hook is passed by wrappers that call ``forward`` themselves.)
"""

from __future__ import annotations

import copyreg
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

Forward = Callable[..., Any]


def swap_forward(module: nn.Module, attribute: str, handler: Callable[..., Any]) -> None:
    """Send ``module.forward(*args, **kwargs)`` through ``handler(module, forward, *args, **kwargs)``.

    Args:
        module: the instance; other instances of its class are untouched.
        attribute: where the handler is kept in the instance's ``__dict__``.
        handler: gets the instance, its class's own bound forward, and the call's arguments.

    Raises:
        RuntimeError: the module is attached to already, or has a ``forward`` of its own that would hide ours.
    """
    if "forward" in module.__dict__:
        raise RuntimeError(
            f"the forward of this {type(module).__name__} was replaced on the instance (Accelerate does so when it "
            "prepares a model for mixed precision or spreads it over devices), which would pass FNGD by: build FNGD "
            "before the model is prepared, as in Trainer(optimizers=(FNGD(model), scheduler))"
        )
    if attribute in module.__dict__:
        raise RuntimeError(
            f"this {type(module).__name__} is attached to another FNGD already; call hf_fngd.detach(model) first"
        )
    module.__dict__[attribute] = handler
    plain: Any = type(module)
    module.__class__ = _subclass(plain, attribute)


def restore_forward(module: nn.Module, attribute: str) -> None:
    """Undo `swap_forward`; the module is again exactly what it was."""
    del module.__dict__[attribute]
    base: Any = type(module).__mro__[1]
    if _subclass(base, attribute) is type(module):
        module.__class__ = base


@functools.cache
def _subclass(base: Any, attribute: str) -> Any:
    plain = getattr(base, "_fngd_plain_class", base)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = base.forward.__get__(self)
        handler = self.__dict__.get(attribute)
        return own(*args, **kwargs) if handler is None else handler(self, own, *args, **kwargs)

    # Not functools.wraps: accelerate follows __wrapped__ when it unwraps a model, past this function.
    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    forward.__doc__ = base.forward.__doc__

    def reduce(self: Any, protocol: Any) -> Any:
        state = base.__reduce_ex__(self, 2)[2]
        assert isinstance(state, dict)
        # Not copyreg.__newobj__, which insists on the instance's present class.
        rebuild, arguments = copyreg._reconstructor, (plain, object, None)  # type: ignore[attr-defined]
        return rebuild, arguments, {key: value for key, value in state.items() if key != attribute}

    return type(
        base.__name__,
        (base,),
        {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "__reduce_ex__": reduce,
            "_fngd_plain_class": plain,
            "forward": forward,
        },
    )
