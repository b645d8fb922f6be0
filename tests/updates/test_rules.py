"""The suite that every update rule inherits; the rules against torch's own, and their learning rates."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_fngd import FNGD, FNGDConfig, learning_rate_from_adamw
from hf_fngd.updates import FALLBACK_RULES, RULES, register_rule
from tests.updates.rules import SHAPES, apply, assert_equal, gradients, ours, start, theirs


@pytest.mark.parametrize("place", ["parameter", "gradient", "moments"])
@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_entries_in_memory_does_not_matter(rule: str, place: str) -> None:
    shape = (4, 6)
    plain, strided = ([one.clone() for one in start([shape])] for _ in range(2))
    memory = torch.zeros(4, 12, dtype=torch.float64)
    if place == "parameter":  # every second entry is another's
        strided = [memory[:, ::2].copy_(strided[0])]
    states: list[tuple[list[Tensor], ...]] = []
    for params in (plain, strided):
        grads = gradients([shape], 0)
        state = tuple([torch.zeros(shape, dtype=torch.float64)] for _ in RULES[rule].state)
        if params is strided and place == "gradient":
            grads = [grads[0].t().contiguous().t()]
        if params is strided and place == "moments":
            state = tuple([torch.zeros(6, 4, dtype=torch.float64).t()] for _ in RULES[rule].state)
        for step in (1, 2):
            state = apply(rule, params, grads, [step], *state)
        states.append(state)
    torch.testing.assert_close(strided[0], plain[0], rtol=1e-12, atol=0)
    assert not memory[:, 1::2].any()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_momentum_is_sgd(momentum: float) -> None:
    found = ours("momentum", SHAPES, momentum=momentum, weight_decay=0.0)
    assert_equal(found, theirs(lambda p: torch.optim.SGD(p, lr=0.05, momentum=momentum), SHAPES))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_adam_is_adamw(momentum: float, weight_decay: float) -> None:
    def make(params: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=0.05, betas=(momentum, 0.98), eps=1e-7, weight_decay=weight_decay)

    assert_equal(ours("adam", SHAPES, momentum=momentum, weight_decay=weight_decay), theirs(make, SHAPES))


def test_adam_counts_the_steps_of_each_parameter() -> None:
    apart = []
    for count in (1, 7):
        params = start([(5,)])
        apply("adam", params, gradients([(5,)], 0), [count])
        apart += params
    params = [p.clone() for p in start([(5,)]) * 2]
    apply("adam", params, gradients([(5,)], 0) * 2, [1, 7])
    assert_equal(params, apart)


@pytest.mark.parametrize("rule", RULES)
def test_weight_decay_is_decoupled(rule: str) -> None:
    params = start([(4, 6)])
    apply(rule, params, [torch.zeros(4, 6, dtype=torch.float64)], [1])
    assert_equal(params, [start([(4, 6)])[0] * (1 - 0.05 * 0.1)])


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_works_in_place_and_leaves_the_gradient_alone(rule: str) -> None:
    params, g = start([(4, 6)]), gradients([(4, 6)], 0)
    before = params[0].clone()
    state = [[torch.zeros_like(params[0])] for _ in RULES[rule].state]
    tensors = [params[0], *(of[0] for of in state)]
    pointers = [x.data_ptr() for x in tensors]
    apply(rule, params, g, [1], *state)
    assert pointers == [x.data_ptr() for x in tensors]
    assert not torch.equal(params[0], before)
    assert all(of[0].any() for of in state)
    assert torch.equal(g[0], gradients([(4, 6)], 0)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_takes_any_precision(rule: str, dtype: torch.dtype) -> None:
    exact, params = start([(4, 6), (6, 4)]), [p.to(dtype) for p in start([(4, 6), (6, 4)])]
    grads = gradients([(4, 6), (6, 4)], 0)
    apply(rule, exact, grads, [1, 1])
    apply(rule, params, [g.to(dtype) for g in grads], [1, 1], eps=1e-4)
    for p, q in zip(params, exact, strict=True):
        assert p.dtype == dtype
        torch.testing.assert_close(p.double(), q, rtol=0, atol=0.03)


@pytest.mark.parametrize("rule", RULES)
def test_nothing_to_update_is_fine_and_zero_gradients_move_nothing(rule: str) -> None:
    params = start([(4, 6)])
    apply(rule, params, [torch.zeros(4, 6, dtype=torch.float64)], [1], weight_decay=0.0)
    assert_equal(params, start([(4, 6)]), rtol=0, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_a_name_cannot_be_registered_twice(rule: str) -> None:
    with pytest.raises(ValueError, match=f"already an update rule named '{rule}'"):
        register_rule(rule)(lambda update: None)


def test_the_arguments_name_rules() -> None:
    assert set(FALLBACK_RULES.values()) <= set(RULES)


@pytest.mark.parametrize("rule", RULES)
def test_a_learning_rate_from_adamws(rule: str) -> None:
    assert learning_rate_from_adamw(3e-4, rule) == pytest.approx({"adam": 3e-4, "momentum": 3e-5}.get(rule, 6e-4))
    assert learning_rate_from_adamw(3e-4) == learning_rate_from_adamw(3e-4, FNGDConfig().update)


class Adapted(nn.Module):
    """A layer with LoRA's two matrices, under the names that PEFT gives them."""

    def __init__(self, trained: bool, also: bool) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4).requires_grad_(also)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2).requires_grad_(trained)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 4).requires_grad_(trained)})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.lora_B["default"](self.lora_A["default"](x))
        return y


class AdaptedByParameters(nn.Linear):
    """As with AdaLoRA, whose matrices are parameters under LoRA's names: no rule for matrices moves them."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.lora_A = nn.ParameterDict({"default": nn.Parameter(torch.zeros(2, 4))})


@pytest.mark.parametrize(
    ("model", "given", "found"),
    [
        (nn.Linear(4, 4), {}, 1e-3),
        (nn.Sequential(nn.Linear(4, 4), AdaptedByParameters()), {}, 1e-3),
        (nn.Sequential(Adapted(True, False)), {}, 3e-3),
        (nn.Sequential(Adapted(True, True)), {"lr": None}, 3e-3),
        (nn.Sequential(Adapted(False, True)), {}, 1e-3),
        (nn.Sequential(Adapted(True, False)), {"lr": 2e-3}, 2e-3),
        (nn.Sequential(Adapted(True, False)), {"update": "adam"}, 1e-3),
        (Adapted(True, False), {"update": "muon"}, 3e-3),
    ],
)
def test_the_default_learning_rate_is_larger_for_adapters(
    model: nn.Module, given: dict[str, Any], found: float
) -> None:
    optimizer = FNGD(model, **given)
    assert {group["lr"] for group in optimizer.param_groups} == {found}
    assert optimizer.config.lr == optimizer.defaults["lr"] == found


@pytest.mark.parametrize(
    ("lr", "update", "error", "message"),
    [
        ("3e-4", "adam", TypeError, "lr must be a finite number >= 0"),
        (-1.0, "adam", ValueError, "lr must be a finite number >= 0"),
        (1e-3, "adamw", ValueError, "update must be one of .*; did you mean 'adam'?"),
    ],
)
def test_no_learning_rate_from_nonsense(lr: Any, update: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        learning_rate_from_adamw(lr, update)
