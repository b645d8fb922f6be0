"""The user's own parameter groups: which parameters they mean, and what they say."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_fngd import FNGD, FNGDConfig
from tests.nets import data, loss, net
from tests.steps import train, with_fngd
from tests.updates.deep import Deep, deep, rates

# Which parameters --------------------------------------------------------------------------------------------

SELECTIONS: dict[str, tuple[Callable[[Deep], Any], set[str]]] = {
    "a name": (lambda m: ["head.weight"], {"head.weight"}),
    "a module": (lambda m: ["head"], {"head.weight", "head.bias"}),
    "a suffix": (lambda m: ["0.fc"], {"layer.0.fc.weight", "layer.0.fc.bias"}),
    "within a module": (
        lambda m: ["layer.1"],
        {f"layer.1.{name}.{leaf}" for name in ("fc", "norm") for leaf in ("weight", "bias")},
    ),
    "several": (lambda m: ("head.bias", "embedding"), {"head.bias", "embedding.weight"}),
    "overlapping": (lambda m: ["head", "head.bias"], {"head.weight", "head.bias"}),
    "a pattern": (lambda m: r"layer\.\d\.fc\.bias", {"layer.0.fc.bias", "layer.1.fc.bias"}),
    "parameters": (lambda m: m.head.parameters(), {"head.weight", "head.bias"}),
    "one parameter": (lambda m: m.head.bias, {"head.bias"}),
    "pairs": (lambda m: m.head.named_parameters(), {"head.weight", "head.bias"}),
    "mixed": (lambda m: [m.head.bias, "embedding"], {"head.bias", "embedding.weight"}),
}  # fmt: skip


@pytest.mark.parametrize(("select", "expected"), SELECTIONS.values(), ids=SELECTIONS)
def test_what_params_means(select: Callable[[Deep], Any], expected: set[str]) -> None:
    model = deep()
    optimizer = FNGD(model, lr=1.0, fallback_lr=2.0, param_groups=[{"params": select(model), "lr": 7.0}])
    found = rates(optimizer)
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert {name for name, lr in found.items() if lr == 7.0} == expected
    # The same by its config, on another instance.
    again = FNGD.from_config(deep(), FNGDConfig.from_dict(json.loads(optimizer.config.to_json_string())))
    assert rates(again) == found


def test_a_parameter_whose_name_ends_anothers_is_kept_apart_in_the_config() -> None:
    def make() -> nn.Module:
        inner = nn.Sequential(nn.Linear(5, 5))
        return nn.Sequential(nn.Linear(5, 5), inner)

    model = make()
    optimizer = FNGD(model, param_groups=[{"params": model[0].parameters(), "lr": 7.0}])
    assert {name for name, lr in rates(optimizer).items() if lr == 7.0} == {"0.weight", "0.bias"}
    assert rates(FNGD.from_config(make(), optimizer.config)) == rates(optimizer)


def test_a_tied_parameter_goes_by_any_of_its_names() -> None:
    model = deep()
    model.tied = nn.Linear(6, 11, bias=False)
    model.tied.weight = model.embedding.weight
    optimizer = FNGD(model, param_groups=[{"params": ["tied"], "lr": 7.0}])
    assert {name for name, lr in rates(optimizer).items() if lr == 7.0} == {"embedding.weight"}


def test_frozen_parameters_are_in_their_group_from_the_start() -> None:
    model = deep()
    model.layer[0].requires_grad_(False)
    groups = [{"params": ["layer.0"], "lr": 7.0}, {"params": [model.embedding.weight.requires_grad_(False)], "lr": 8.0}]
    optimizer = FNGD(model, param_groups=groups)
    own = {name: lr for name, lr in rates(optimizer).items() if lr >= 7.0}
    norm = ("layer.0.norm.weight", "layer.0.norm.bias")
    assert own == dict.fromkeys(["layer.0.fc.weight", "layer.0.fc.bias", *norm], 7.0) | {"embedding.weight": 8.0}


# What they say -----------------------------------------------------------------------------------------------


def test_a_group_is_split_as_the_model_is_and_those_of_layers_come_first() -> None:
    model = deep()
    groups = [
        {"params": ["layer.0", "embedding"], "lr": 0.1},
        {"params": ["head"], "update": "adam", "weight_decay": 0.5},
    ]
    settings = {"lr": 1.0, "fallback_lr": 2.0, "weight_decay": 0.25}
    optimizer = FNGD(model, param_groups=groups, **settings)
    keys = ["name", "rule", "lr", "weight_decay", "layers", "param_names"]
    assert [[group[key] for key in keys] for group in optimizer.param_groups] == [
        ["preconditioned", "block_muon", 1.0, 0.25, [1], ["layer.1.fc.weight"]],
        ["preconditioned_no_decay", "adam", 1.0, 0.0, [1], ["layer.1.fc.bias"]],
        ["preconditioned_0", "block_muon", 0.1, 0.25, [0], ["layer.0.fc.weight"]],
        ["preconditioned_no_decay_0", "adam", 0.1, 0.0, [0], ["layer.0.fc.bias"]],
        ["preconditioned_1", "adam", 1.0, 0.5, [2], ["head.weight"]],
        ["preconditioned_no_decay_1", "adam", 1.0, 0.5, [2], ["head.bias"]],
        ["plain_no_decay", "adam", 2.0, 0.0, [], ["layer.1.norm.weight", "layer.1.norm.bias"]],
        ["plain_0", "adam", 0.1, 0.25, [], ["embedding.weight"]],
        ["plain_no_decay_0", "adam", 0.1, 0.0, [], ["layer.0.norm.weight", "layer.0.norm.bias"]],
    ]  # fmt: skip
    assert optimizer.defaults["lr"] == 1.0
    assert optimizer.config == FNGDConfig(param_groups=groups, **settings)


def test_only_the_rule_momentum_takes_the_papers_step() -> None:
    """A group under another rule moves as if it were all of the optimizer's."""

    def moved(**settings: Any) -> Tensor:
        model, optimizer = with_fngd(lr=0.01, sharing="never", **settings)
        train(model, optimizer, 3)
        return model.fc2.weight.detach()

    mixed = moved(update="momentum", param_groups=[{"params": ["fc2"], "update": "adam"}])
    assert not torch.equal(mixed, moved(update="momentum"))
    model, optimizer = with_fngd(sharing="never", param_groups=[{"params": ["fc2"], "update": "momentum"}])
    loss(model, *data(6)).backward()
    optimizer.step()  # in a group alone as well
    assert optimizer.state[model.fc2.weight]["momentum_buffer"].norm() > 0
    with pytest.raises(ValueError, match="update='momentum' steps by the paper's"):
        FNGD(net(), param_groups=[{"params": ["fc2"], "update": "momentum"}])
    for update in ("adam", "muon"):
        FNGD(
            net(), sharing="never", update="momentum", fallback="sgd", beta2=0.9,
            param_groups=[{"params": ["fc2"], "update": update}],
        )  # fmt: skip


ERRORS: dict[str, tuple[Callable[[Deep], Any], str]] = {
    "no such name": (
        lambda m: [{"params": ["heads"]}],
        r"\[0\]\['params'\] has 'heads', which means no parameter of the model; .*'embedding.weight'",
    ),
    "no such pattern": (lambda m: [{"params": r"heads\..*"}], r"\['params'\] has 'heads.*means no parameter of"),
    "a name for a pattern": (lambda m: [{"params": "head"}], r"regular expression, .*give a list, \['head'\]"),
    "nothing": (lambda m: [{"params": []}], r"\[0\]\['params'\] must hold 1 to \d+ names or parameters, got 0"),
    "an empty iterator": (lambda m: [{"params": iter([])}], "must hold 1 to .*, got 0"),
    "twice": (
        lambda m: [{"params": ["head"]}, {"params": [m.head.bias]}],
        r"head.bias is in two groups, param_groups\[0\] and param_groups\[1\]",
    ),
    "foreign": (
        lambda m: [{"params": deep().head.parameters()}],
        r"a Parameter of the shape \(3, 6\) that is none of the model's",
    ),
    "quantized": (
        lambda m: [{"params": ["quantized"]}],
        r"means quantized, which is quantized \(torch.int8\)",
    ),
    "a rule for no matrix": (
        lambda m: [{"params": ["embedding"], "update": "adam"}],
        r"\[0\]\['update'\]='adam' has no effect",
    ),
    "a wrong rule": (
        lambda m: [{"params": ["head"], "update": "adamw"}],
        r"\[0\]\['update'\] must be one of .*did you mean 'adam'",
    ),
    "a wrong rate": (
        lambda m: [{"params": ["head"], "lr": -1}],
        r"param_groups\[0\]\['lr'\] must be a finite number >= 0, got -1",
    ),
}


@pytest.mark.parametrize(("groups", "message"), ERRORS.values(), ids=ERRORS)
def test_a_wrong_group_is_refused_and_the_model_is_plain_again(groups: Callable[[Deep], Any], message: str) -> None:
    model = deep()
    model.quantized = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=message):
        FNGD(model, param_groups=groups(model))
    FNGD(model)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"params": ["head"], "learning_rate": 1}, "has no key 'learning_rate'; use 'lr'"),
        ({"params": ["head"], "weight_deca": 1}, "no key 'weight_deca'; did you mean 'weight_decay'"),
        ({"params": ["head"], "momentum": 0.5}, "no key 'momentum', got"),
        ({"lr": 1}, r"param_groups\[0\] must be a dict with 'params'"),
        ({"params": {"head"}}, r"\['params'\] must be a regular expression, or a list of"),
        ({"params": [1]}, r"\['params'\]\[0\] must be a name, a Parameter or a \(name, Parameter\) pair, got 1"),
        ({"params": ["head"], "lr": "1"}, r"\['lr'\] must be"),
    ],
)
def test_a_group_of_the_wrong_type_is_refused(group: Any, message: str) -> None:
    for make in (lambda: FNGD(deep(), param_groups=[group]), lambda: FNGDConfig(param_groups=[group])):
        with pytest.raises(TypeError, match=message):
            make()


def test_a_config_holds_names_alone() -> None:
    with pytest.raises(TypeError, match=r"param_groups\[0\]\['params'\] must hold names in a config, got Parameters"):
        FNGDConfig(param_groups=[{"params": deep().parameters()}])


def test_add_param_group_names_the_argument() -> None:
    with pytest.raises(ValueError, match=r"param_groups=\[\.\.\.\]"):
        FNGD(deep()).add_param_group({"params": [nn.Parameter(torch.ones(1))]})
