"""Somebody else makes, wraps or freezes the model: PEFT, hyperparameter search, TRL."""

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import peft
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedTokenizerFast, TrainingArguments
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.trainer_utils import BestRun, HPSearchBackend
from trl import SFTConfig, SFTTrainer

from hf_fngd import FNGDFactory
from tests.modes.harness import (
    PER_EPOCH,
    SAMPLES,
    Record,
    Recorder,
    Recording,
    RecordingTrainer,
    arguments,
    optimizer_arguments,
    run,
    train,
)
from tests.modes.nets import PADDING, VOCABULARY, Kind, gpt2, language_data, language_loss, llama, older_names
from tests.modes.registry import checked, mode


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


def by_factory(sharing: str, args: TrainingArguments) -> tuple[type[FNGDFactory], dict[str, Any]]:
    """FNGD as Trainer makes it, with the learning rate of Trainer's arguments."""
    given = optimizer_arguments(sharing)
    return FNGDFactory, {"args": args} | {name: given[name] for name in given if name != "lr"}


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
        optimizer_cls_and_kwargs=by_factory(sharing, args),
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
    special = {"bos_token": "t0", "eos_token": f"t{PADDING}", "pad_token": f"t{PADDING}", "unk_token": "t2"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="t2")), **special)


def fine_tuned(kind: Kind, sharing: str, folder: Path, config: peft.LoraConfig | None) -> Record:
    args = arguments(folder, SFTConfig, max_length=16, learning_rate=1e-2, bf16=False, activation_checkpointing=False)
    with older_names():
        trainer = RecordingSFT(
            model=causal(kind)(),
            args=args,
            train_dataset=language_data(SAMPLES).select_columns(["input_ids"]),
            processing_class=tokenizer(),
            peft_config=config,
            optimizer_cls_and_kwargs=by_factory(sharing, args),
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
