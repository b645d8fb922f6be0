"""Precision, loss scaling, smoothing, clipping, recomputation, compilation."""

import warnings
from pathlib import Path

import torch
from torch._dynamo.utils import counters
from transformers import TrainingArguments

from hf_fngd import FNGD
from tests.modes.harness import BATCH, SAMPLES, Record, optimizer_arguments, train
from tests.modes.nets import Kind
from tests.modes.oracle import compare
from tests.modes.registry import Run, checked, mode, simple

mode("fp32")(simple())
mode("bf16 autocast", tolerance=0.1)(simple(bf16=True))


def scaled(kind: Kind, sharing: str, overflows: tuple[int, ...]) -> Record:
    """Two epochs of a plain loop under fp16 autocast with a loss scaler, some of whose batches overflow.

    Accelerate has no loss scaler on a CPU.
    """
    model, record = kind.make(), Record()
    optimizer = FNGD(model, **optimizer_arguments(sharing))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=1000)
    rows = kind.data(SAMPLES).with_format("torch")
    for number in range(2 * SAMPLES // BATCH):
        first = number * BATCH % SAMPLES
        inputs = rows[first : first + BATCH]
        if number in overflows:
            scaler.update(2.0**60)
        with torch.autocast("cpu", torch.float16):
            loss = model(**inputs).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if number in overflows:
            assert not all(torch.isfinite(p.grad).all() for p in model.parameters())
        else:
            record.batch(inputs, loss)
            record.step(optimizer)
        parameters = [p.clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        assert all(map(torch.equal, parameters, model.parameters())) == (number in overflows)
        if number in overflows:
            scaler.update(2.0**12)
        optimizer.zero_grad()
        if first + BATCH == SAMPLES:
            optimizer.end_epoch()
            record.steps[-1].ended_epoch = True
    return record


def fp16(overflows: tuple[int, ...]) -> Run:
    return lambda kind, sharing, folder: checked(kind, sharing, scaled(kind, sharing, overflows))


mode("fp16 with a loss scaler", tolerance=0.02)(fp16(()))
mode("fp16, overflowed steps that the scaler skips", tolerance=0.02)(fp16((1, 3)))
mode("label smoothing")(simple(label_smoothing_factor=0.2, smoothing=0.2))


@mode("Trainer's default clipping")
def clipping(kind: Kind, sharing: str, folder: Path) -> float:
    record = train(kind, sharing, folder, max_grad_norm=TrainingArguments.max_grad_norm)
    assert compare(kind, record).clipped > 1
    return checked(kind, sharing, record)


def recomputed(reentrant: bool) -> Run:
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}

    def run(kind: Kind, sharing: str, folder: Path) -> float:
        record = train(kind, sharing, folder, **options)
        assert record.model is not None
        assert record.model.is_activation_checkpointing
        return checked(kind, sharing, record)

    return run


mode("activation checkpointing, non-reentrant")(recomputed(False))
mode("activation checkpointing, reentrant")(recomputed(True))


@mode("torch_compile")
def compiled(kind: Kind, sharing: str, folder: Path) -> float:
    """One graph, no break, no recompilation from step to step across the switch."""
    torch._dynamo.reset()
    counters.clear()
    try:
        with torch._dynamo.config.patch(error_on_recompile=True), warnings.catch_warnings():
            # Raised and ignored by the compiler itself.
            warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
            record = train(kind, sharing, folder, torch_compile=True, torch_compile_backend="aot_eager")
    finally:
        breaks, graphs = dict(counters["graph_break"]), counters["stats"]["unique_graphs"]
        torch._dynamo.reset()
        counters.clear()
    assert not breaks
    assert graphs == 1
    return checked(kind, sharing, record)
