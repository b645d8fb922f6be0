"""Parameter groups: who is decayed (Trainer's own rule), and who is updated by which rule."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import Trainer

from hf_fngd import FNGD
from tests.architectures.families import FAMILIES
from tests.nets import net


class WithNorm(nn.Module):
    """Names that the rule is about: `norm` as a whole word, and as a part of another."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.normal = nn.Linear(2, 2)
        self.post_norm = nn.GroupNorm(1, 2)
        self.RMSNorm = nn.RMSNorm(2)
        self.plain = nn.LayerNorm(2)
        self.temperature = nn.Parameter(torch.ones(()))


MODELS = {name: family.build for name, family in FAMILIES.items()} | {"names": WithNorm, "net": net}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_every_parameter_is_in_one_group_and_decay_follows_trainers_rule(
    make: Callable[[], nn.Module],
) -> None:
    model = make()
    groups = FNGD(model, weight_decay=0.1).param_groups
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in model.parameters()}
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    expected = {id(p) for name, p in model.named_parameters() if name in decayed}
    assert {id(p) for group in groups if group["weight_decay"] for p in group["params"]} == expected


@pytest.mark.parametrize(("update", "of_biases"), [("momentum", "momentum"), ("adam", "adam"), ("muon", "adam")])
def test_the_groups_of_a_small_network(update: str, of_biases: str) -> None:
    model = net()
    settings = {"lr": 0.1, "weight_decay": 0.01, "fallback_lr": 0.2, "sharing": "never"}
    groups = FNGD(model, update=update, **settings).param_groups
    fields = ["name", "rule", "lr", "weight_decay", "layers"]
    assert [[group[key] for key in fields] for group in groups] == [
        ["preconditioned", update, 0.1, 0.01, [0, 1]],
        ["preconditioned_no_decay", of_biases, 0.1, 0.0, [0, 1]],
        ["plain_no_decay", "adam", 0.2, 0.0, []],
    ]
    fc1, fc2, norm = model.fc1, model.fc2, model.norm
    expected = [[fc1.weight, fc2.weight], [fc1.bias, fc2.bias], [norm.weight, norm.bias]]
    for group, parameters in zip(groups, expected, strict=True):
        assert all(p is q for p, q in zip(group["params"], parameters, strict=True))


def test_layers_that_are_not_selected_get_the_fallback() -> None:
    model = net()
    names = {group["name"]: group for group in FNGD(model, target_modules=["fc2"], weight_decay=0.01).param_groups}
    assert names["plain"]["params"] == [model.fc1.weight]
    assert names["plain"]["rule"] == "adam"
    assert names["plain"]["weight_decay"] == 0.01
    assert names["preconditioned"]["layers"] == [0]


def test_frozen_parameters_are_in_the_groups_that_they_have_when_they_are_trained() -> None:
    model, frozen = net(), net()
    frozen.fc1.requires_grad_(False)
    frozen.norm.requires_grad_(False)
    frozen.quantized = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    keys = ("name", "rule", "param_names", "layers")
    expected, found = ([[g[key] for key in keys] for g in FNGD(each).param_groups] for each in (model, frozen))
    assert found == expected


def test_a_bias_beside_a_frozen_weight_has_the_fallback_rule() -> None:
    model = net()
    model.fc1.weight.requires_grad_(False)
    groups = {name: group["name"] for group in FNGD(model).param_groups for name in group["param_names"]}
    assert groups["fc1.bias"] == "plain_no_decay"
    assert groups["fc1.weight"] == "preconditioned"
