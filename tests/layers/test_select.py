"""Which layers are preconditioned: by type, by training, by ownership and by name."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from hf_fngd import FNGD
from hf_fngd.layers.base import find_kernel
from hf_fngd.layers.select import Modules, select_layers
from tests.nets import EVERY_TYPE, data, loss, net
from tests.refusals import refusal
from tests.steps import one_step, with_fngd


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(3)
        self.myfc1 = nn.Linear(3, 3)
        self.head = nn.Linear(3, 7, bias=False)
        self.scale = nn.Parameter(torch.ones(()))


def names(model: nn.Module, targets: Modules = "all-linear", excluded: Modules = None) -> list[str]:
    """Those of the preconditioned layers."""
    return [layer.name for layer in select_layers(model, targets, excluded).preconditioned]


ALL = ["layers.0.fc1", "layers.0.fc2", "layers.1.fc1", "layers.1.fc2", "myfc1", "head"]


@pytest.mark.parametrize(
    ("targets", "excluded", "expected"),
    [
        ("all-linear", None, ALL),
        ("all-linear", "head", ALL[:-1]),
        ("all-linear", ["head", "fc2"], ["layers.0.fc1", "layers.1.fc1", "myfc1"]),
        ("all-linear", [], ALL),
        (r".*\.fc1", None, ["layers.0.fc1", "layers.1.fc1"]),
        ("fc1|head", None, ["head"]),  # a regular expression matches the whole name
        (["fc1"], None, ["layers.0.fc1", "layers.1.fc1"]),  # a suffix ends at a dot
        (["0.fc1", "head"], None, ["layers.0.fc1", "head"]),
        (("layers.1.fc2",), None, ["layers.1.fc2"]),
        (["fc1"], r"layers\.0\..*", ["layers.1.fc1"]),
        (["fc1", "embedding"], None, ["layers.0.fc1", "layers.1.fc1"]),
        (["layers.1"], ["fc2"], ["layers.1.fc1"]),  # all in a module
        (["0", "head"], None, ["layers.0.fc1", "layers.0.fc2", "head"]),
        (["layers"], ["1"], ["layers.0.fc1", "layers.0.fc2"]),
    ],
)
def test_names_choose_as_in_peft(targets: Modules, excluded: Modules, expected: list[str]) -> None:
    assert names(Model(), targets, excluded) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["embedding"]),
        ({"layer_types": EVERY_TYPE}, ["embedding", "norm"]),
        ({"layer_types": EVERY_TYPE, "target_modules": "head"}, ["embedding", "norm"]),
        ({"layer_types": EVERY_TYPE, "exclude_modules": ["norm", "fc1"]}, ["embedding"]),
        ({"layer_types": ["linear", "norm"]}, ["norm"]),
        ({"layer_types": ["linear"]}, []),
        ({"solves": True}, []),
    ],
)
def test_layers_of_other_types_come_after_the_matrices(settings: dict[str, Any], expected: list[str]) -> None:
    selection = select_layers(Model(), **({"target_modules": "all-linear", "exclude_modules": None} | settings))
    count = len(selection.preconditioned)
    assert [layer.name for layer in selection.attached[count:]] == expected
    assert [layer.preconditioned for layer in selection.attached] == [True] * count + [False] * len(expected)
    assert "embedding.weight" in selection.plain


def test_layers_come_with_their_module_and_kernel_in_the_models_order() -> None:
    model = Model()
    for layer in select_layers(model, "all-linear", None).preconditioned:
        assert layer.module is model.get_submodule(layer.name)
        assert type(layer.kernel) is type(find_kernel(layer.module)[1])


def test_every_trainable_parameter_is_accounted_for() -> None:
    model = Model()
    selection = select_layers(model, "all-linear", "head")
    taken = {
        f"{layer.name}.{leaf}" for layer in selection.preconditioned for leaf, _ in layer.module.named_parameters()
    }
    assert taken.isdisjoint(selection.plain)
    assert taken | set(selection.plain) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("embedding.weight", "Embedding is not a preconditioned layer type"),
        ("norm.bias", "LayerNorm: 'norm' is not among layer_types"),
        ("scale", "Model is not a preconditioned layer type"),
        ("myfc1.weight", "not among target_modules"),
        ("layers.0.fc1.bias", "among exclude_modules"),
    ],
)
def test_plain_parameters_have_a_reason(name: str, reason: str) -> None:
    assert select_layers(Model(), ["fc1", "fc2", "head"], ["0.fc1"]).plain[name] == reason


def test_a_tied_head_stays_plain() -> None:
    model = Model()
    model.head.weight = model.embedding.weight
    selection = select_layers(model, "all-linear", None)
    assert [layer.name for layer in selection.attached] == [*ALL[:-1], "embedding", "head"]
    assert selection.plain["head.weight"] == "the weight is tied to another module"


def test_layers_that_share_a_bias_stay_plain() -> None:
    model = Model()
    model.layers[0].fc1.bias = model.layers[1].fc1.bias
    assert names(model) == ["layers.0.fc2", "layers.1.fc2", "myfc1", "head"]


def test_frozen_layers_are_selected_too_and_reported_once_they_are_trained() -> None:
    model = Model()
    model.myfc1.weight.requires_grad_(False)
    model.layers[0].requires_grad_(False)
    model.norm.requires_grad_(False)
    selection = select_layers(model, "all-linear", None)
    assert [layer.name for layer in selection.preconditioned] == names(Model())
    assert selection.plain["myfc1.bias"] == "the layer's weight is frozen"
    assert not any(name.startswith(("layers.0", "norm")) for name in selection.plain)
    model.requires_grad_(True)
    assert "myfc1.bias" not in selection.plain
    assert "norm.bias" in selection.plain


def test_a_frozen_bias_does_not_keep_the_weight_out() -> None:
    model = Model()
    model.myfc1.bias.requires_grad_(False)
    assert "myfc1" in names(model)


def test_a_model_that_is_a_layer_is_selected() -> None:
    assert names(nn.Linear(2, 2)) == [""]


def test_a_shared_module_counts_once() -> None:
    model = net()
    model.again = model.fc1
    assert names(model) == ["fc1", "fc2"]


NOTHING = [
    (Model(), ["fc1", "fc9"], None, "target_modules lists 'fc9', which is no module of the model; did you mean 'fc"),
    (Model(), ["fc1", "head9"], None, "lists 'head9', which is no module of the model; .*'layers.0.fc1'"),
    (Model(), ["c1"], None, "target_modules lists 'c1'"),
    (Model(), "all-linear", ["fc9"], "exclude_modules lists 'fc9'"),
    (Model(), "all-linear", "fc1", "exclude_modules='fc1' matches the whole name of no module; its modules are named"),
    (Model(), "fc1", None, "target_modules='fc1', exclude_modules=None and layer_types=None select"),
    (Model(), "all-linear", ".*", "nothing to precondition"),
    (Model(), ["norm"], None, "nothing to precondition"),
    (nn.Embedding(3, 2), "all-linear", None, "nothing to precondition"),
    (nn.Sequential(), "all-linear", None, "nothing to precondition"),
    (nn.Linear(2, 2).requires_grad_(False), "all-linear", None, "nothing to precondition"),
    (Model().requires_grad_(False), "all-linear", None, "6 are frozen, and one has to be trained when FNGD is built"),
    # Its out_proj is a subclass of Linear that is never called.
    (nn.MultiheadAttention(4, 2), "all-linear", None, r"no trainable torch\.nn\.Linear, transformers Conv1D or conv"),
]


@pytest.mark.parametrize(("model", "targets", "excluded", "message"), NOTHING, ids=range(len(NOTHING)))
def test_what_selects_nothing_is_an_error_that_says_so(
    model: nn.Module, targets: Modules, excluded: Modules, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        select_layers(model, targets, excluded)


HOSTILE = [
    *(r"(a|aa)+b", r"(\w+)+!!", r"(?:a*)*b", r"(?:a+a+)+y", r"^(?:(?:a+)?)+$b", "a?" * 99 + "a" * 99 + "!!"),
    *("a*" * 99 + "b", r"(.*a){99}", r"(?=(a+)+b).*", r"(?<=a)(?:b|a{1,99})*b", r"(?P<n>a*)(?:(?P=n)a*)+!!"),
    *("(?i)" + "[\0-\U0010ffff]" * 500, "[\u0100-\uffff]" * 500),
]


@pytest.mark.parametrize("pattern", HOSTILE, ids=range(len(HOSTILE)))
def test_a_pattern_that_may_take_long_is_an_error_in_bounded_time(pattern: str) -> None:
    model = nn.ModuleDict({"a" * 60 + "!": nn.Linear(2, 2)})
    error = refusal(lambda: select_layers(model, pattern, None), seconds=4.0)
    assert isinstance(error, ValueError)
    assert "nothing to precondition" in str(error) or "took longer than 1 s to match the module name" in str(error)


def test_a_weight_that_was_pruned_before_is_plain_and_reported() -> None:
    model = net()
    prune.l1_unstructured(model.fc1, "weight", amount=0.5)
    optimizer = FNGD(model)
    one_step(model, optimizer, *data(6, 4))
    assert "computed from other parameters" in optimizer.coverage().plain["fc1.weight_orig"]
    assert set(optimizer.coverage().preconditioned) == {"fc2.weight", "fc2.bias"}


def test_a_weight_that_is_pruned_meanwhile_stays_preconditioned() -> None:
    model, optimizer = with_fngd(sharing="replay")
    for layer in (model.fc1, model.fc2):
        prune.l1_unstructured(layer, "weight", amount=0.5)
    for seed in (1, 2):
        loss(model, *data(6, 4, seed=seed)).backward()
    optimizer.step()
    assert len(optimizer.preconditioner.state_dict()["policy"]["rows"]) == 2
    assert not optimizer.coverage().missed
