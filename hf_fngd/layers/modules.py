"""What a module is to a layer type: its class, its own parameters, and its forward with other ones."""

from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.parametrize import is_parametrized

PLAIN_CLASS = "_fngd_plain_class"  # the attribute of a generated subclass that holds the class it replaces


def plain_class(module: nn.Module) -> type[nn.Module]:
    """A module's class without the subclasses that FSDP2 and this package generate."""
    cls = type(module)
    if issubclass(cls, FSDPModule):
        cls = cls.__mro__[cls.__mro__.index(FSDPModule) + 1]
    # FSDP2's subclass may be one of a subclass of ours, whose preconditioner is gone.
    return getattr(cls, PLAIN_CLASS, cls)


class With:
    """Stands in for a module in its own forward, with other parameters. What the forward sets is set in the module."""

    def __init__(self, module: nn.Module, **parameters: Tensor) -> None:
        self.__dict__.update(_module=module, **parameters)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)


def with_methods(module: nn.Module) -> type[With]:
    """A subclass of `With` that has the module's methods and properties, so that these see the other parameters."""
    classes = [cls for cls in reversed(plain_class(module).__mro__) if not issubclass(nn.Module, cls)]
    members = {name: value for cls in classes for name, value in vars(cls).items()}
    methods = {
        name: value
        for name, value in members.items()
        if isinstance(value, FunctionType | property) and not (name.startswith("__") and name.endswith("__"))
    }
    return type("With", (With,), methods)


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own trained parameters by name."""
    return {name: p for name, p in module.named_parameters(recurse=False) if p.requires_grad}


def may_train(parameter: Tensor) -> bool:
    """Whether a parameter is trained or could be unfrozen. A quantized one could not."""
    return parameter.requires_grad or (parameter.is_floating_point() and parameter.element_size() > 1)


def to_train(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own parameters that are trained or could be unfrozen, by name."""
    return {name: p for name, p in module.named_parameters(recurse=False) if may_train(p)}


def weight_of(module: nn.Module) -> Tensor | None:
    """The parameter that stands for a layer: its ``weight``, what that is computed from, or the first trained one."""
    weight: Any = module._parameters.get("weight")
    if weight is not None:  # the common case, and quick
        return weight  # type: ignore[no-any-return]
    if is_parametrized(module, "weight"):  # asking for the weight would compute it anew, which may change a state
        parametrizations: Any = module.parametrizations
        return next(parametrizations["weight"].parameters(recurse=False), None)
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) else next(iter((trained(module) or to_train(module)).values()), None)


def is_frozen(module: nn.Module) -> bool:
    """Whether a layer's weight is frozen. If it is computed from other parameters, whether these are."""
    weight: Tensor | None = module._parameters.get("weight")
    if weight is not None:  # the common case, and quick: an adapted model has hundreds of frozen layers
        return not weight.requires_grad
    weight = weight_of(module)
    return weight is not None and not (weight.requires_grad or weight.grad_fn)


def operands(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, weight and bias of a matrix product, cast as autocast would; autograd casts the gradients back."""
    weight, bias = parameters(module)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # autocast leaves float64 alone
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return x, weight, bias


def parameters(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """A layer's weight, and its bias if it has one."""
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    return weight, bias
