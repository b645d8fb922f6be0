"""Every registered layer type: its conversions, and the registry."""

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_fngd.layers import LayerKernel, kernel_for, known_layers, register_kernel
from hf_fngd.layers.base import _KERNELS
from tests.nets import LAYERS, layer

SHAPES = [(6,), (3, 6), (2, 3, 6), (2, 3, 2, 6)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def made(layer_type: str, bias: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, LayerKernel]:
    torch.manual_seed(0)
    module = layer(layer_type, bias, 6, 4).to(dtype)
    kernel = kernel_for(module)
    assert kernel is not None
    return module, kernel


def test_the_table_covers_every_registered_type() -> None:
    assert known_layers() == tuple(sorted({layer_type for layer_type, _ in LAYERS}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("layer_type", "bias"), LAYERS)
def test_forward_is_the_layers_own_bit_for_bit(
    layer_type: str, bias: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    module, kernel = made(layer_type, bias, dtype)
    x = torch.randn(shape).to(dtype)
    assert torch.equal(kernel.forward(x, module.weight, module.bias), module(x))


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize(("layer_type", "bias"), LAYERS)
def test_forward_takes_inputs_that_are_not_contiguous(layer_type: str, bias: str, shape: tuple[int, ...]) -> None:
    module, kernel = made(layer_type, bias)
    x = torch.randn(*shape[:-2], shape[-1], shape[-2], dtype=torch.float64).transpose(-1, -2)
    assert not x.is_contiguous()
    torch.testing.assert_close(kernel.forward(x, module.weight, module.bias), module(x.contiguous()))


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize(("layer_type", "bias"), LAYERS)
def test_gradients_are_those_of_autograd(layer_type: str, bias: str, shape: tuple[int, ...]) -> None:
    module, kernel = made(layer_type, bias)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = module(x)
    g = torch.randn_like(y)
    of_x, of_weight = torch.autograd.grad(y, (x, module.weight), g)
    torch.testing.assert_close(kernel.input_gradient(g, module.weight), of_x)
    a, g = kernel.canonical(x.detach(), shape[0]), kernel.canonical(g, shape[0])
    assert a.shape == (shape[0], x[0].numel() // 6, 6)
    assert g.shape == (shape[0], x[0].numel() // 6, 4)
    torch.testing.assert_close(kernel.weighted_gradient(a, g, None), of_weight)
    ones = torch.ones(shape[0], dtype=torch.float64)
    torch.testing.assert_close(kernel.weighted_gradient(a, g, ones), of_weight)


@pytest.mark.parametrize(("layer_type", "bias"), LAYERS)
def test_a_weight_scales_its_own_sample(layer_type: str, bias: str) -> None:
    module, kernel = made(layer_type, bias)
    a, g = torch.randn(3, 5, 6, dtype=torch.float64), torch.randn(3, 5, 4, dtype=torch.float64)
    w = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    parts: list[Tensor] = [kernel.weighted_gradient(a[n : n + 1], g[n : n + 1], None) for n in range(3)]
    assert parts[0].shape == module.weight.shape
    torch.testing.assert_close(kernel.weighted_gradient(a, g, w), 0.5 * parts[0] + 2 * parts[2])


class CustomLinear(nn.Linear):
    """Any subclass may compute something else."""


@pytest.mark.parametrize("module", [CustomLinear(2, 2), nn.Embedding(2, 2), nn.LayerNorm(2), nn.Bilinear(2, 2, 2)])
def test_only_exact_types_have_a_kernel(module: nn.Module) -> None:
    assert kernel_for(module) is None


@pytest.mark.parametrize("layer_type", [nn.Linear, Conv1D])
def test_a_type_cannot_be_registered_twice(layer_type: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match=f"{layer_type.__name__} already has the kernel {layer_type.__name__}Kernel"):
        register_kernel(layer_type, _KERNELS[nn.Linear])


def test_a_new_type_is_one_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(_KERNELS, CustomLinear, raising=False)
    try:
        register_kernel(CustomLinear, _KERNELS[nn.Linear])
        assert kernel_for(CustomLinear(2, 2)) is _KERNELS[nn.Linear]
        assert "CustomLinear" in known_layers()
    finally:
        del _KERNELS[CustomLinear]
