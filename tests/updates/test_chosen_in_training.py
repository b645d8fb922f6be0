"""The user's own parameter groups in training: checkpoints, schedulers, the Trainer, and a whole trajectory."""

import re
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
from tests.nets import WithLoss, samples
from tests.steps import assert_equal, digest, train, with_fngd
from tests.updates.deep import Deep, deep, rates

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
