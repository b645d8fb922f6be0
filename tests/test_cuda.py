"""On a CUDA device: the same numbers as in float64 on a CPU, in every precision, and nothing waits for the device.

Skipped where there is no such device.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_fngd import FNGD, FNGDPreconditioner
from hf_fngd.weights.base import policy_names
from tests.architectures.families import FAMILIES, Family
from tests.architectures.oracle import outcomes
from tests.architectures.registry import to
from tests.modes.nets import bert
from tests.nets import EVERY_TYPE, UPDATES_OF, Checkpointed, Net, data, loss, net, settings_of
from tests.steps import assert_equal, gradient, relative_error

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    # Raised and ignored by the compiler itself.
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

PAIRS = [(sharing, update) for sharing in policy_names() for update in UPDATES_OF[sharing]]


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """No tf32, which cuDNN's convolutions have by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def on(device: str, x: Any) -> Any:
    """A batch on a device."""
    if isinstance(x, dict):
        return {key: on(device, value) for key, value in x.items()}
    return x.to(device) if isinstance(x, Tensor) else x


def trajectory(device: str, dtype: torch.dtype, steps: int, **settings: Any) -> nn.Module:
    model = net(dtype=dtype).to(device)
    optimizer = FNGD(model, lr=1e-2, **settings)
    for step in range(steps):
        x, y = data(6, 3, seed=step, dtype=dtype)
        optimizer.zero_grad()
        loss(model, x.to(device), y.to(device)).backward()
        optimizer.step()
        if step == 2:
            optimizer.end_epoch()
    return model.cpu().requires_grad_(False)


@pytest.mark.parametrize(("sharing", "update"), PAIRS)
def test_a_trajectory_is_the_cpus(sharing: str, update: str) -> None:
    settings = settings_of(sharing, damping=0.1) | {"update": update}
    expected = trajectory("cpu", torch.float64, 8, **settings)
    found = trajectory("cuda", torch.float64, 8, **settings)
    for (name, p), q in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert relative_error(p, q) < 1e-9, name


@pytest.mark.parametrize("cls", [Net, Checkpointed])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("sharing", policy_names())
def test_gradients_under_autocast(sharing: str, dtype: torch.dtype, cls: type[Net]) -> None:
    exact, half = net(), net(dtype=torch.float32, cls=cls).cuda()
    settings = settings_of(sharing, damping=0.3)
    kept = FNGDPreconditioner(exact, **settings), FNGDPreconditioner(half, **settings)
    x, y = data(32, 3)
    x[0] *= 20
    loss(exact, x, y).backward()
    with torch.autocast("cuda", dtype):
        value = loss(half, x.float().cuda(), y.cuda())
    scale = 128.0 if dtype == torch.float16 else 1.0
    (scale * value).backward()
    assert relative_error(gradient(half).cpu() / scale, gradient(exact)) < 0.03
    del kept


@pytest.mark.parametrize("sharing", policy_names())
def test_a_step_that_the_loss_scaler_skips_leaves_no_trace(sharing: str) -> None:
    settings = settings_of(sharing, damping=0.1)
    models = [net(dtype=torch.float32).cuda() for _ in range(2)]
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    for model, overflows in zip(models, (True, False), strict=True):
        optimizer = FNGD(model, lr=1e-2, **settings)
        for step in range(4):
            x, y = data(6, 3, seed=step, dtype=torch.float32)
            for bad in (True, False) if overflows and step == 2 else (False,):
                optimizer.zero_grad()
                value = loss(model, x.cuda(), y.cuda())
                scaler.scale(value * (torch.inf if bad else 1)).backward()
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update(2.0**10)
        assert optimizer.skipped == 0  # the scaler did not call it
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert relative_error(p.detach(), q.detach()) < 1e-5, name


def test_a_step_with_a_gradient_that_is_not_finite_leaves_no_trace() -> None:
    models = [net(dtype=torch.float32).cuda() for _ in range(2)]
    for model, bad in zip(models, (True, False), strict=True):
        optimizer = FNGD(model, lr=1e-2)
        for step in range(6):
            x, y = data(6, 3, seed=step, dtype=torch.float32)
            for value in (torch.nan, torch.inf, 1.0) if bad and step in (0, 3) else (1.0,):
                optimizer.zero_grad()
                (loss(model, x.cuda(), y.cuda()) * value).backward()
                optimizer.step()
        assert optimizer.skipped == (4 if bad else 0)
        assert {state["step"] for state in optimizer.state_dict()["state"].values()} == {6}
    assert_equal(*models)


def run_family(family: Family, device: str, dtype: torch.dtype, sharing: str) -> tuple[dict[str, Tensor], Any]:
    model = family.model(dtype).to(device)
    kept = FNGDPreconditioner(model, sharing=sharing, layer_types=EVERY_TYPE)
    model(**to(dtype, on(device, family.batch(5, 7)))).loss.backward()
    kept.step()
    grads = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return grads, outcomes(kept.coverage())


@pytest.mark.parametrize("family", [pytest.param(family, id=name) for name, family in FAMILIES.items()])
def test_families_have_the_gradients_of_float64_on_a_cpu(family: Family) -> None:
    expected, told = run_family(family, "cpu", torch.float64, "clipped")
    found, same = run_family(family, "cuda", torch.float32, "clipped")
    assert same == told
    assert found.keys() == expected.keys()
    total = torch.stack([grad.norm() for grad in expected.values()]).norm()
    wrong = {name: float((found[name] - grad).norm() / total) for name, grad in expected.items()}
    assert max(wrong.values()) < 1e-3, {name: value for name, value in wrong.items() if value > 1e-3}


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("sharing", policy_names())
def test_compiled_gradients_are_the_eager_ones(sharing: str, mode: str) -> None:
    torch._dynamo.reset()
    eager = net(dtype=torch.float32).cuda()
    model = copy.deepcopy(eager)
    optimizers = [FNGD(m, lr=1e-2, **settings_of(sharing, damping=0.1)) for m in (eager, model)]
    called = torch.compile(model, mode=mode)
    for step in range(5):
        x, y = data(6, 3, seed=step, dtype=torch.float32)
        for optimizer, m in zip(optimizers, (eager, called), strict=True):
            optimizer.zero_grad()
            loss(m, x.cuda(), y.cuda()).backward()
        assert relative_error(gradient(model), gradient(eager)) < 1e-3, step
        for optimizer in optimizers:
            optimizer.step()
    torch._dynamo.reset()


def test_neither_forward_nor_backward_waits_for_the_device() -> None:
    model = net(dtype=torch.float32).cuda()
    optimizer = FNGD(model, lr=1e-2)
    batches = [tuple(tensor.cuda() for tensor in data(6, 3, seed=step, dtype=torch.float32)) for step in range(4)]
    for step, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            loss(model, x, y).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        optimizer.step()


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Twenty-four texts and their classes."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, n: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(n)
        return {"input_ids": torch.randint(2, 24, (8,), generator=generator), "labels": n % 3}


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_run_under_trainer_resumes(precision: str, tmp_path: Path) -> None:
    def trainer(name: str, max_steps: int = -1) -> Trainer:
        model = bert()
        args = TrainingArguments(
            str(tmp_path / name), per_device_train_batch_size=4, num_train_epochs=3, save_steps=6, report_to=[],
            logging_steps=1, gradient_accumulation_steps=2, lr_scheduler_type="constant", max_steps=max_steps,
            **({} if precision == "no" else {precision: True}),
        )  # fmt: skip
        return Trainer(model=model, args=args, train_dataset=Rows(), optimizers=(FNGD(model, lr=1e-3), None))

    straight = trainer("straight")
    straight.train()
    trainer("resumed", max_steps=6).train()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-6"))
    found = []
    for run in (straight, resumed):
        assert next(run.model.parameters()).is_cuda
        assert run.state.global_step == 9
        assert all(torch.isfinite(p).all() for p in run.model.parameters())
        found.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
    assert relative_error(found[1], found[0]) < 1e-3
