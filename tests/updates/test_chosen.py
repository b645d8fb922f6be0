"""The user's own parameter groups: which parameters they mean, what they say, checkpoints, and a whole trajectory."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import Trainer

from hf_fngd import FNGD, FNGDConfig, FNGDFactory, unwrap
from hf_fngd.updates import RULES, Update
from tests.modes.harness import arguments
from tests.nets import WithLoss, data, loss, net, samples
from tests.steps import assert_equal, digest, train, with_fngd


class Deep(nn.Module):
    """An embedding, two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.layer = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(6, 6), "norm": nn.LayerNorm(6)}) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x).mean(1)
        for block in self.layer:
            x = x + block["norm"](torch.tanh(block["fc"](x)))
        return self.head(x)


def deep() -> Deep:
    torch.manual_seed(0)
    return Deep().double()


def rates(optimizer: FNGD, key: str = "lr") -> dict[str, Any]:
    return {name: group[key] for group in optimizer.param_groups for name in group["param_names"]}


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


# Checkpoints and schedulers ----------------------------------------------------------------------------------

HEAD = [{"params": ["fc2"], "lr": 0.03}]


def trained_net(groups: Any, steps: int = 3) -> tuple[nn.Module, FNGD]:
    model, optimizer = with_fngd(lr=0.01, param_groups=groups)
    train(model, optimizer, steps)
    return model, optimizer


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    model, optimizer = trained_net(HEAD)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "checkpoint")
    weights, state = torch.load(tmp_path / "checkpoint", weights_only=True)
    again, second = trained_net(HEAD, 0)
    again.load_state_dict(weights)
    second.load_state_dict(state)
    for of in ((model, optimizer), (again, second)):
        train(*of, 3, first=3)
    assert_equal(model, again)


@pytest.mark.parametrize(
    ("saved", "own", "message"),
    [
        (HEAD, None, "has 5 parameter groups, this optimizer has 3; they differ in precond.*_0, .*param_groups"),
        (None, HEAD, "has 3 parameter groups, this optimizer has 5; they differ in preconditioned_0"),
        (HEAD, [{"params": ["fc1"]}], r"group 'preconditioned' .*only one has fc1.weight, fc2.weight\).*param_groups"),
        (HEAD, [{"params": ["fc2"], "update": "adam"}], "update rules are .*param_groups"),
    ],
)  # fmt: skip
def test_a_checkpoint_with_other_groups_is_refused_by_naming_them(saved: Any, own: Any, message: str) -> None:
    state = trained_net(saved)[1].state_dict()
    optimizer = trained_net(own, 0)[1]
    before = digest(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert digest(optimizer.state_dict()) == before


def test_schedulers_keep_the_ratio_of_the_rates() -> None:
    _, optimizer = trained_net(HEAD, 1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(3):
        assert rates(optimizer)["fc2.weight"] == pytest.approx(3 * rates(optimizer)["fc1.weight"])
        assert scheduler.get_last_lr()[0] == pytest.approx(0.01 / (1 + step))
        optimizer.step()
        scheduler.step()


def test_accelerate_prepares_it() -> None:
    model, optimizer = trained_net(HEAD, 1)
    before = rates(optimizer)
    prepared = Accelerator(cpu=True).prepare(optimizer)
    assert rates(unwrap(prepared)) == before
    train(model, prepared, 1, first=1)
    assert_equal(model, trained_net(HEAD, 2)[0])


def test_resized_rows_keep_their_moments() -> None:
    model = deep()
    optimizer = FNGD(model, param_groups=[{"params": ["embedding"], "lr": 0.1}])
    x, y = torch.arange(12).view(4, 3) % 11, torch.tensor([0, 1, 2, 0])
    for rows in (11, 13):
        weight = model.embedding.weight
        weight.data = F.pad(weight.data, (0, 0, 0, rows - len(weight)))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    moments = optimizer.state[model.embedding.weight]["exp_avg"]
    assert moments.shape == (13, 6)
    assert moments[:11].abs().sum() > 0


@pytest.mark.parametrize("way", ["optimizers", "factory", "config"])
def test_trainer_trains_with_them_and_logs_the_rate_of_the_first(way: str, tmp_path: Path) -> None:
    logging = {"logging_strategy": "steps", "logging_steps": 1}
    args = arguments(tmp_path, max_steps=2, learning_rate=0.02, lr_scheduler_type="linear", **logging)
    model = WithLoss()
    groups = [{"params": ["fc2"], "lr": 0.5}]
    if way == "optimizers":
        own = {"optimizers": (FNGD.from_training_args(model, args, param_groups=groups), None)}
    else:
        kwargs = {"param_groups": groups} if way == "factory" else {"config": FNGDConfig(param_groups=groups)}
        own = {"optimizer_cls_and_kwargs": (FNGDFactory, {"args": args, **kwargs})}
    trainer = Trainer(model, args, train_dataset=samples(8), **own)
    trainer.train()
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == pytest.approx([0.02, 0.01])
    bases = rates(unwrap(trainer.optimizer), "initial_lr")
    assert bases["net.fc1.weight"] == 0.02
    assert bases["net.fc2.weight"] == 0.5


# A whole trajectory ------------------------------------------------------------------------------------------

DECAY, LR, HEAD_LR = 0.5, 0.02, 0.05
LAYER_WISE = [
    {"params": ["embedding"], "lr": LR * DECAY**2},
    *({"params": [f"layer.{n}"], "lr": LR * DECAY ** (1 - n)} for n in range(2)),
    {"params": ["head"], "lr": HEAD_LR, "weight_decay": 0.3},
]


def lr_of(name: str) -> float:
    """Layer-wise decay, written down by hand."""
    if name.startswith("head"):
        return HEAD_LR
    return {"embedding": 0.005, "layer.0": 0.01, "layer.1": 0.02}[re.match(r"embedding|layer\.\d", name)[0]]


def slow_gradients(model: Deep, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Sample by sample; Linear layers are clipped by their own per-sample norms, the embedding by that of its output.

    Where every sample has one position, the norm that FNGD takes, of inputs times output gradients, is the true one.
    """
    names = [name for name, _ in model.named_parameters()]
    each: list[dict[str, Tensor]] = []
    for n in range(len(x)):
        value = F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]) / len(x)
        each.append(dict(zip(names, torch.autograd.grad(value, list(model.parameters())), strict=True)))
    found = {}
    for name in names:
        layer = [f"{name.rpartition('.')[0]}.{leaf}" for leaf in ("weight", "bias")]
        layer = [leaf for leaf in layer if leaf in names]
        norms = torch.stack([sum(h[leaf].square().sum() for leaf in layer).sqrt() for h in each])
        w = torch.ones(len(x)) if "norm" in name else (norms.mean() / norms).clamp(max=1)
        found[name] = sum(w[n] * h[name] for n, h in enumerate(each))
    return found


@pytest.mark.parametrize("update", ["adam", "muon"])
def test_layer_wise_rates_train_as_a_slow_reference_does(update: str) -> None:
    model, slow = deep(), deep()
    optimizer = FNGD(model, lr=LR, update=update, weight_decay=0.1, param_groups=LAYER_WISE)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 20)
    moments: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(0)
    for step in range(8):
        x = torch.randint(11, (6, 1), generator=generator)  # one position
        y = torch.randint(3, (6,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()
        gradients = slow_gradients(slow, x, y)
        for name, p in slow.named_parameters():
            lr = lr_of(name) * (1 - step / 20)
            bias_or_norm = "norm" in name or name.endswith("bias")
            decay = 0.3 if name.startswith("head") else 0.0 if bias_or_norm else 0.1
            m = moments.setdefault(name, [torch.zeros_like(p), torch.zeros_like(p)])
            with torch.no_grad():
                if update == "muon" and p.dim() == 2 and not name.startswith(("embedding", "head")):
                    group = {"lr": lr, "momentum": 0.9, "weight_decay": decay}
                    RULES["muon"].update(
                        Update([p], [gradients[name]], [m[:1]], [step + 1], [p], [(1, p.shape[-1])], group)
                    )
                    continue
                m[0].mul_(0.9).add_(gradients[name], alpha=0.1)
                m[1].mul_(0.999).add_(gradients[name].square(), alpha=0.001)
                p.mul_(1 - lr * decay)
                mean, square = m[0] / (1 - 0.9 ** (step + 1)), m[1] / (1 - 0.999 ** (step + 1))
                p.sub_(lr * mean / (square.sqrt() + 1e-8))
    for (name, p), q in zip(model.named_parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9, msg=name)
    untouched = dict(deep().named_parameters())
    assert all((p - untouched[name]).abs().max() > 1e-3 for name, p in model.named_parameters())
