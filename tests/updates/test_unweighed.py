"""Matrices whose samples cannot be weighed, and which an update rule for matrices steps all the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import hf_fngd
from hf_fngd import FNGD
from hf_fngd.config import PRESETS
from hf_fngd.updates.orthogonal import orthogonalize

WIDTH, LR = 8, 1e-2


class Reversed(nn.Linear):
    """No layer type takes it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(-1))


class Attention(nn.Module):
    """torch's own attention, with a head, and a Linear that computes something else."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, **options)
        self.reversed, self.head = Reversed(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.attention(x, x[..., : self.attention.kdim], x[..., : self.attention.vdim], need_weights=False)
        return self.head(self.reversed(y))


def mixture() -> nn.Module:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 6, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = hf.MixtralConfig(vocab_size=11, num_hidden_layers=1, num_local_experts=3, num_experts_per_tok=2, **sizes)
    model = hf.MixtralForCausalLM(config)
    model.set_experts_implementation("eager")  # the default wants larger sizes
    return model


def run(model: nn.Module) -> Tensor:
    if isinstance(model, Attention):
        return model(torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(0))).square().mean()
    ids = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids, labels=ids).loss


EXPERTS = "model.layers.0.mlp.experts"
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "attention": (Attention, {"attention.in_proj_weight": 3, "attention.out_proj.weight": 1, "reversed.weight": 1}),
    "cross attention": (
        lambda: Attention(kdim=4, vdim=6),
        {f"attention.{name}_proj_weight": 1 for name in "qkv"} | {"attention.out_proj.weight": 1, "reversed.weight": 1},
    ),
    "mixture": (mixture, {f"{EXPERTS}.gate_up_proj": 3, f"{EXPERTS}.down_proj": 3}),
}


def build(case: str) -> tuple[nn.Module, dict[str, int]]:
    torch.manual_seed(0)
    make, expected = CASES[case]
    return make().train(), expected


@pytest.mark.parametrize("case", CASES)
def test_each_matrix_is_orthogonalized_by_itself(case: str) -> None:
    model, expected = build(case)
    optimizer = FNGD(model, lr=LR, momentum=0.0)
    before = {name: model.get_parameter(name).detach().clone() for name in expected}
    run(model).backward()
    optimizer.step()
    for name, count in expected.items():
        p, g = model.get_parameter(name), model.get_parameter(name).grad
        matrices = g.view(count, -1, g.shape[-1])
        moved = before[name] - 0.2 * LR * max(matrices.shape[1:]) ** 0.5 * orthogonalize(matrices).view_as(p)
        torch.testing.assert_close(p.detach(), moved, rtol=1e-5, atol=1e-7)
    report = optimizer.coverage()
    assert {name for name, reason in report.plain.items() if reason.endswith("the update rule steps it")} == set(
        expected
    )
    assert not report.missed


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "settings", [{"update": "adam"}, PRESETS["paper"], {"exclude_modules": "attention.*|reversed|.*experts"}]
)
def test_they_have_the_fallback_rule_where_another_update_rule_is_chosen_or_they_are_left_out(
    case: str, settings: dict[str, Any]
) -> None:
    model, expected = build(case)
    optimizer = FNGD(model, **settings)
    assert not any("matrices" in group and not group["layers"] for group in optimizer.param_groups)
    rest = {name for group in optimizer.param_groups if not group["layers"] for name in group["param_names"]}
    assert set(expected) <= rest
    assert not any("update rule" in reason for reason in optimizer.coverage().plain.values())


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_resumes(case: str) -> None:
    runs = []
    for interrupted in (False, True):
        model, _ = build(case)
        optimizer = FNGD(model, lr=LR, update="block_muon", block_size=2)
        for step in range(4):
            run(model).backward()
            optimizer.step()
            optimizer.zero_grad()
            if interrupted and step == 1:
                state, copied = optimizer.state_dict(), build(case)[0]
                copied.load_state_dict(model.state_dict())
                model, optimizer = copied, FNGD(copied, lr=LR, update="block_muon", block_size=2)
                optimizer.load_state_dict(state)
        runs.append(model.state_dict())
    assert all(torch.equal(p, runs[1][name]) for name, p in runs[0].items())


def test_a_linear_whose_type_is_left_out_has_the_fallback_rule() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), hf.pytorch_utils.Conv1D(WIDTH, WIDTH))
    groups = FNGD(model, layer_types=["conv1d"]).param_groups
    assert {name: group["rule"] for group in groups for name in group["param_names"]} == {
        "1.weight": "block_muon",
        **dict.fromkeys(["1.bias", "0.weight", "0.bias"], "adam"),
    }


class Doubling(hf.pytorch_utils.Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class DoublingLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(("kept", "other"), [("linear", Doubling), ("conv1d", DoublingLinear)])
def test_a_subclass_whose_type_is_left_out_has_the_fallback_rule(kept: str, other: type[nn.Module]) -> None:
    own = nn.Linear(WIDTH, WIDTH) if kept == "linear" else hf.pytorch_utils.Conv1D(WIDTH, WIDTH)
    model = nn.Sequential(own, other(WIDTH, WIDTH))
    for types, rule in (([kept], "adam"), (None, "block_muon")):
        groups = FNGD(model, layer_types=types).param_groups
        rules = {name: group["rule"] for group in groups for name in group["param_names"]}
        assert (rules["0.weight"], rules["1.weight"]) == ("block_muon", rule)
        hf_fngd.detach(model)


def test_a_users_group_may_give_them_another_rule() -> None:
    model, _ = build("attention")
    groups = [{"params": ["attention.in_proj_weight"], "update": "muon"}]
    found = {
        name: group["rule"] for group in FNGD(model, param_groups=groups).param_groups for name in group["param_names"]
    }
    assert found["attention.in_proj_weight"] == "muon"
    assert found["attention.out_proj.weight"] == "block_muon"


def test_complex_matrices_are_none_of_them() -> None:
    class Complex(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(self.weight.dtype)).abs()

    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Complex(WIDTH, WIDTH, bias=False, dtype=torch.complex64))
    optimizer = FNGD(model)
    model(torch.randn(4, WIDTH)).sum().backward()
    optimizer.step()
    assert {g["rule"] for g in optimizer.param_groups if "1.weight" in g["param_names"]} == {"adam"}


@pytest.mark.parametrize(("key", "values"), [("block_size", (2, 4)), ("ns_steps", (5, 3))])
def test_blocks_of_another_size_or_other_steps_do_not_resume(key: str, values: tuple[int, int]) -> None:
    first, second = (FNGD(nn.Linear(WIDTH, WIDTH), update="block_muon", **{key: value}) for value in values)
    message = f"the checkpoint's {key} is {values[0]}, this optimizer's is {values[1]}: construct FNGD"
    with pytest.raises(ValueError, match=message):
        second.load_state_dict(first.state_dict())


def test_a_state_of_before_steps_were_an_argument_has_five() -> None:
    first, fewer = FNGD(model := nn.Linear(WIDTH, WIDTH)), FNGD(nn.Linear(WIDTH, WIDTH), ns_steps=3)
    state = first.state_dict()
    for group in state["param_groups"]:
        group.pop("ns_steps", None)
    with pytest.raises(ValueError, match="the checkpoint's ns_steps is 5, this optimizer's is 3"):
        fewer.load_state_dict(state)
    first.load_state_dict(state)
    model(torch.randn(3, WIDTH)).sum().backward()
    first.step()
