"""The modes, in the order of the table."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import peft
import torch
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import PreTrainedTokenizerFast, TrainingArguments
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import BestRun, HPSearchBackend
from trl import SFTConfig, SFTTrainer

from hf_fngd import FNGD, FNGDFactory
from tests.distributed.launch import launch
from tests.distributed.test_environment import STATES
from tests.modes.harness import (
    BATCH,
    PER_EPOCH,
    SAMPLES,
    OutOfMemory,
    Record,
    Recorder,
    Recording,
    RecordingTrainer,
    Stream,
    arguments,
    optimizer_arguments,
    run,
    train,
)
from tests.modes.nets import LENGTH, PADDING, VOCABULARY, Kind, gpt2, language_data, language_loss, llama
from tests.modes.oracle import compare
from tests.modes.registry import FP32, MODES, Run, checked, mode

__all__ = ["MODES"]


def simple(sizes: list[list[int]] | None = None, smoothing: float = 0.0, shares: bool = True, **changes: Any) -> Run:
    """A run with other `TrainingArguments`, and the batch sizes of each of its steps."""

    def run(kind: Kind, sharing: str, folder: Path) -> float:
        data = {"data": Stream(kind.data(changes["samples"]))} if changes.get("stream") else {}
        given = {key: value for key, value in changes.items() if key != "stream"}
        record = train(kind, sharing, folder, **given, **data)
        assert sizes is None or sizes_of(record) == sizes
        return checked(kind, sharing, record, shares=shares, smoothing=smoothing)

    return run


def sizes_of(record: Record) -> list[list[int]]:
    return [[len(batch.inputs["input_ids"]) for batch in step.batches] for step in record.steps]


def simple_modes(modes: dict[str, Run], tolerance: float = FP32) -> None:
    for name, made in modes.items():
        mode(name, tolerance=tolerance)(made)


# Precision, loss scaling, smoothing, clipping, recomputation, compilation --------------------------------------

simple_modes({"fp32": simple()})
simple_modes({"bf16 autocast": simple(bf16=True)}, tolerance=0.1)


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


@mode("fp16 with a loss scaler", tolerance=0.02)
def fp16(kind: Kind, sharing: str, folder: Path) -> float:
    return checked(kind, sharing, scaled(kind, sharing, ()))


@mode("fp16, overflowed steps that the scaler skips", tolerance=0.02)
def fp16_overflow(kind: Kind, sharing: str, folder: Path) -> float:
    return checked(kind, sharing, scaled(kind, sharing, (1, 3)))


simple_modes({"label smoothing": simple(label_smoothing_factor=0.2, smoothing=0.2)})


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


simple_modes(
    {
        "activation checkpointing, non-reentrant": recomputed(False),
        "activation checkpointing, reentrant": recomputed(True),
    }
)


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


# Which batches there are, how many make a step, where a run begins and ends -----------------------------------

simple_modes(
    {
        "gradient accumulation 2": simple([[4, 4]] * 4, samples=16, gradient_accumulation_steps=2),
        "gradient accumulation 2, with a remainder": simple([[4, 4], [4]] * 2, gradient_accumulation_steps=2),
        "gradient accumulation 4, with a remainder": simple(
            [[2, 2, 2, 2], [2, 2]] * 2, per_device_train_batch_size=2, gradient_accumulation_steps=4
        ),
        "dataloader_drop_last=False, a last batch of another size": simple([[4], [4], [4], [2]] * 2, samples=14),
        "dataloader_drop_last=True": simple([[4], [4], [4]] * 2, samples=14, dataloader_drop_last=True),
    }
)


def padded(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch as long as its longest sample."""
    longest = max(len(sample["input_ids"]) for sample in samples)

    def stack(values: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([value + [filler] * (longest - len(value)) for value in values])

    labels = [sample["labels"] for sample in samples]
    return {
        "input_ids": stack([sample["input_ids"] for sample in samples], PADDING),
        "attention_mask": stack([[1] * len(sample["input_ids"]) for sample in samples], 0),
        "labels": stack(labels, -100) if isinstance(labels[0], list) else torch.tensor(labels),
    }


@mode('train_sampling_strategy="group_by_length"')
def grouped_by_length(kind: Kind, sharing: str, folder: Path) -> float:
    def cut(sample: dict[str, Any], number: int) -> dict[str, Any]:
        length, labels = LENGTH - 5 * number % 7, sample["labels"]
        return {
            "input_ids": sample["input_ids"][:length],
            "labels": labels[:length] if isinstance(labels, list) else labels,
        }

    data = kind.data(SAMPLES).map(cut, with_indices=True)
    options = {"collator": padded, "train_sampling_strategy": "group_by_length"}
    record = train(kind, sharing, folder, data=data, **options)
    assert len({step.batches[0].inputs["input_ids"].shape[1] for step in record.steps}) > 1
    return checked(kind, sharing, record)


simple_modes(
    {
        "iterable dataset without length": simple([[4]] * 6, samples=12, stream=True, max_steps=6),
        # Nobody sees the end of the epoch: the cap ends the phase.
        "iterable dataset without length, gradient accumulation 2": simple(
            [[4, 4]] * 4,
            samples=16,
            stream=True,
            max_steps=4,
            gradient_accumulation_steps=2,
            fngd={"coefficient_steps": 2},
        ),
        "max_steps shorter than an epoch": simple([[4]] * 2, max_steps=2, shares=False),
    }
)


@mode("two train() calls")
def two_calls(kind: Kind, sharing: str, folder: Path) -> float:
    """The second one goes on with the optimizer of the first: all of it is shared."""
    model, record = kind.make(), Record()
    trainer = RecordingTrainer(
        model=model,
        args=arguments(folder, num_train_epochs=1),
        train_dataset=kind.data(SAMPLES),
        optimizers=(FNGD(model, **optimizer_arguments(sharing)), None),
        callbacks=[Recorder(record)],
    )
    run(trainer, record=record)
    run(trainer, record=record)
    assert len(record.steps) == 2 * PER_EPOCH
    return checked(kind, sharing, record)


def out_of_memory(step: int) -> Run:
    def run(kind: Kind, sharing: str, folder: Path) -> float:
        model = kind.make()
        layers = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
        failure = OutOfMemory(layers[3], step)
        record = train(kind, sharing, folder, model=model, callbacks=[failure], auto_find_batch_size=True)
        assert failure.raised
        assert sizes_of(record) == [[BATCH]] * step + [[3]] * 8  # Accelerate takes nine tenths of the batch size
        return checked(kind, sharing, record, inspected=step == 0)

    return run


simple_modes(
    {
        "auto_find_batch_size, out of memory in the first backward": out_of_memory(0),
        "auto_find_batch_size, out of memory in a later backward": out_of_memory(2),
    }
)


# Somebody else makes, wraps or freezes the model: PEFT, hyperparameter search, TRL ------------------------------


@contextlib.contextmanager
def older_names() -> Iterator[None]:
    """PEFT reads a property that transformers renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def wrapped(model: nn.Module, config: peft.LoraConfig) -> nn.Module:
    torch.manual_seed(1)
    with older_names():
        made: nn.Module = peft.get_peft_model(model, config)
    return made


def lora(**changes: Any) -> peft.LoraConfig:
    """Both matrices of each adapter random, so that both have a gradient from the first step on."""
    return peft.LoraConfig(r=3, lora_dropout=0.0, init_lora_weights=False, **changes)


@mode("PEFT LoRA")
def adapters(kind: Kind, sharing: str, folder: Path) -> float:
    config = {
        "Linear": {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]},
        "Conv1D": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    }[kind.name]

    def make() -> nn.Module:
        return wrapped(kind.make(), lora(**config))

    record = train(kind, sharing, folder, model=make())
    assert record.optimizer is not None
    names = [layer.name for layer in record.optimizer.preconditioner.layers]
    assert sum(".lora_" in name for name in names) == 8
    return checked(kind, sharing, record, make=make)


@mode("frozen layers")
def frozen(kind: Kind, sharing: str, folder: Path) -> float:
    model = kind.make()
    for name, p in model.named_parameters():
        # A whole block, the embeddings, and the biases of the other block
        p.requires_grad_(".0." not in name and "embeddings" not in name and "wte" not in name and "bias" not in name)
    record = train(kind, sharing, folder, model=model)
    assert record.optimizer is not None
    assert 0 < len(record.optimizer.preconditioner.layers) < sum(".1." in name for name, _ in model.named_modules())
    assert all("bias" not in name for name in record.steps[0].gradients)
    return checked(kind, sharing, record)


class Search:
    """A backend of Trainer's hyperparameter search that tries two learning rates."""

    RATES = (1e-2, 2e-2)

    def ensure_available(self) -> None:
        pass

    def default_hp_space(self, trial: Any) -> None:
        pass

    def run(self, trainer: Any, n_trials: int, direction: str, **kwargs: Any) -> BestRun:
        for number, rate in enumerate(self.RATES[:n_trials]):
            trainer.train(trial=SimpleNamespace(number=number, params={"learning_rate": rate}))
        return BestRun("0", 0.0, {"learning_rate": self.RATES[0]})


@mode("hyperparameter search")
def search(kind: Kind, sharing: str, folder: Path) -> float:
    """Each trial has a model and an optimizer of its own, and its learning rate."""
    args = arguments(folder)
    trainer = RecordingTrainer(
        model_init=lambda: kind.make(),  # which may not take arguments
        args=args,
        train_dataset=kind.data(SAMPLES),
        optimizer_cls_and_kwargs=(FNGDFactory, {"args": args, **without_rate(sharing)}),
    )
    trials = Trials(trainer)
    backend = HPSearchBackend.OPTUNA  # whose trials are known by a number and have parameters
    with (
        mock.patch.dict(ALL_HYPERPARAMETER_SEARCH_BACKENDS, {backend: Search}),
        mock.patch("transformers.integrations.hp_params", lambda trial: trial.params),
        mock.patch("gc.collect"),
    ):
        trainer.hyperparameter_search(lambda trial: trial.params, n_trials=2, backend=backend, direction="minimize")
    first, second = trials.records
    assert first.optimizer is not second.optimizer
    rates = [record.optimizer.param_groups[0]["initial_lr"] for record in trials.records if record.optimizer]
    assert rates == list(Search.RATES)
    return max(checked(kind, sharing, record) for record in trials.records)


def without_rate(sharing: str) -> dict[str, Any]:
    return {key: value for key, value in optimizer_arguments(sharing).items() if key != "lr"}


class Trials(Recorder):
    """A record for each trial."""

    def __init__(self, trainer: RecordingTrainer) -> None:
        self.trainer, self.records = trainer, []
        trainer.add_callback(self)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.record = self.record = Record()
        self.records.append(self.record)


class RecordingSFT(Recording, SFTTrainer):
    """TRL's supervised fine-tuning, recorded."""


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"t{n}": n for n in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="t2")),
        bos_token="t0",
        eos_token=f"t{PADDING}",
        pad_token=f"t{PADDING}",
        unk_token="t2",
    )


def fine_tuned(kind: Kind, sharing: str, folder: Path, config: peft.LoraConfig | None) -> Record:
    args = arguments(folder, SFTConfig, max_length=16, learning_rate=1e-2, bf16=False, activation_checkpointing=False)
    with older_names():
        trainer = RecordingSFT(
            model=causal(kind)(),
            args=args,
            train_dataset=language_data(SAMPLES).select_columns(["input_ids"]),
            processing_class=tokenizer(),
            peft_config=config,
            optimizer_cls_and_kwargs=(FNGDFactory, {"args": args, **without_rate(sharing)}),
        )
    record = run(trainer)
    assert len(record.steps) == 2 * PER_EPOCH
    return record


def causal(kind: Kind) -> Callable[[], nn.Module]:
    """A language model with the kind's layers."""
    return {"Linear": llama, "Conv1D": gpt2}[kind.name]


@mode("TRL SFTTrainer")
def sft(kind: Kind, sharing: str, folder: Path) -> float:
    record = fine_tuned(kind, sharing, folder, None)
    return checked(kind, sharing, record, make=causal(kind), loss=language_loss)


@mode("TRL SFTTrainer, PEFT LoRA")
def sft_adapters(kind: Kind, sharing: str, folder: Path) -> float:
    targets = {"Linear": ["q_proj", "up_proj"], "Conv1D": ["c_attn", "c_fc"]}[kind.name]
    config = lora(target_modules=targets, fan_in_fan_out=kind.name == "Conv1D", task_type="CAUSAL_LM")

    def make() -> nn.Module:
        return wrapped(causal(kind)(), config)

    record = fine_tuned(kind, sharing, folder, config)
    return checked(kind, sharing, record, make=make, loss=language_loss)


# Several processes: those that FNGD trains in, and those modes that it refuses --------------------------------

# Settings of tests.distributed.checks that stand for a policy.
SETTINGS = {"never": "never, momentum", "replay": "replay, momentum", "clipped": "clipped, adam"}


@functools.cache
def launched(check: str, world: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return launch("tests.distributed.checks", world, Path(folder), check)[check]


def processes(check: str, world: int) -> Run:
    """Parameters after 12 steps, against one process that accumulates the micro-batches of all."""

    def run(kind: Kind, sharing: str, folder: Path) -> float:
        outcome = launched(check, world)[f"{SETTINGS[sharing]}, {kind.name}"]
        assert outcome["active"]
        assert outcome["agree"], "the processes differ"
        return float(outcome["error"] / outcome["moved"])

    return run


for title, check, world in (
    ("DDP, 2 processes", "ddp", 2),
    ("DDP, 4 processes", "ddp", 4),
    ("FSDP2, 2 processes", "fsdp2", 2),
    ("FSDP2, 4 processes", "fsdp2", 4),
    ("FSDP2, sharded after FNGD was built, as Accelerate does", "fsdp2_after", 2),
):
    mode(title, tolerance=1e-12, tested_in="tests/distributed")(processes(check, world))


def refused(values: dict[str, Any]) -> Run:
    def run(kind: Kind, sharing: str, folder: Path) -> float:
        with mock.patch.dict(AcceleratorState._shared_state, values):
            FNGD(kind.make(), **optimizer_arguments(sharing))
        return 0.0

    return run


for name, (values, message) in STATES.items():
    mode(name if name[0].isupper() else f"{name} parallelism", refused=message)(refused(values))


@mode("nn.DataParallel", refused=r"nn.DataParallel, .* use accelerate launch with DistributedDataParallel")
def data_parallel(kind: Kind, sharing: str, folder: Path) -> float:
    FNGD(nn.DataParallel(kind.make()), **optimizer_arguments(sharing))
    return 0.0
