"""Quantization of an attached model in place, and layers that are put in the place of attached ones."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn
from torch.ao import quantization

from tests.nets import FEATURES
from tests.steps import train, with_fngd

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*(reduce_range|quantize_per_tensor).*:UserWarning"),
]


def dynamic(model: nn.Module) -> nn.Module:
    return quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


def aware(model: nn.Module) -> nn.Module:
    model.qconfig = quantization.get_default_qat_qconfig()
    return quantization.prepare_qat(model, inplace=True)


def observed(model: nn.Module) -> nn.Module:
    model.qconfig = quantization.get_default_qconfig()
    return quantization.prepare(model, inplace=True)


QUANTIZED = {
    "dynamic": dynamic,
    "dynamic, of a part": lambda model: dynamic(nn.Sequential(model.fc1)),
    "for quantization-aware training": aware,
    "with observers": observed,
}


@pytest.mark.parametrize("quantize", QUANTIZED.values(), ids=QUANTIZED)
def test_quantization_in_place_is_refused_and_that_of_a_copy_is_not(quantize: Callable[[Any], nn.Module]) -> None:
    model, optimizer = with_fngd()
    with pytest.raises(RuntimeError, match=r"Quantization in place .* copy.deepcopy\(model\)"):
        quantize(model)
    train(model.train(), optimizer, 1)  # torch puts the model in eval mode first
    assert optimizer.coverage().missed == {}
    plain = copy.deepcopy(model)
    types = {type(module) for module in plain.modules()} | {nn.Sequential}
    assert not {type(module) for module in quantize(plain).modules()} <= types


def test_a_users_own_setting_for_quantization_is_kept() -> None:
    model, _optimizer = with_fngd()
    assert not hasattr(model.fc1, "qconfig")
    model.fc1.qconfig = None
    assert model.fc1.qconfig is None
    assert copy.deepcopy(model).fc1.qconfig is None
    del model.fc1.qconfig
    assert not hasattr(model.fc1, "qconfig")


class Swapped(nn.Linear):
    """As torchao puts in a layer's place."""

    def forward(self, input: Tensor) -> Tensor:
        return 0.5 * super().forward(input)


@pytest.mark.parametrize("same", [True, False])
def test_a_layer_that_is_replaced_in_place_is_reported_or_refused(same: bool) -> None:
    model, optimizer = with_fngd()
    train(model, optimizer, 1)
    old, model.fc1 = model.fc1, Swapped(FEATURES, 7).double()
    if same:
        model.fc1.weight, model.fc1.bias = old.weight, old.bias
        train(model, optimizer, 2)
        assert set(optimizer.coverage().missed) == {"fc1.weight", "fc1.bias"}
    else:
        with pytest.raises(RuntimeError, match="in no group of this optimizer"):
            train(model, optimizer, 1)
