"""FNGD under the Hugging Face Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_fngd import FNGD, FNGDCallback, FNGDConfig, FNGDFactory, FNGDPreconditioner, add_index
from hf_fngd.sharing import IndexSharing

SAMPLES, BATCH, EPOCHS = 48, 8, 3
PER_EPOCH = SAMPLES // BATCH


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=32,
            n_positions=16,
            n_embd=32,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def bert() -> PreTrainedModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def text(model: PreTrainedModel, samples: int = SAMPLES) -> Dataset:
    """Sequences that count upwards; their first token gives the class."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(2, 20, (samples,), generator=generator)
    ids = starts[:, None] + torch.arange(10)
    labels = ids.tolist() if isinstance(model, GPT2LMHeadModel) else (starts >= 11).long().tolist()
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels})


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": BATCH,
            "num_train_epochs": EPOCHS,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "seed": 3,
        }
        | changes
    )


class Phases(TrainerCallback):
    """Which optimizer steps computed coefficients: the preconditioner's schedule, read before each step."""

    def __init__(self, preconditioner: FNGDPreconditioner) -> None:
        self.preconditioner = preconditioner
        self.steps: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.preconditioner.phase.computes:
            self.steps.append(state.global_step)


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("make", [gpt2, bert])
def test_trains_without_a_callback_and_switches_at_the_end_of_the_first_epoch(make: Any, tmp_path: Path) -> None:
    model = make()
    optimizer = FNGD(model, sharing="ranked", lr=1e-2, refresh=5)
    phases = Phases(optimizer.preconditioner)
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=text(model),
        optimizers=(optimizer, None),
        callbacks=[phases],
    )
    trainer.train()
    history = losses(trainer)
    assert sum(history[-PER_EPOCH:]) < 0.9 * sum(history[:PER_EPOCH])
    first_epoch = list(range(PER_EPOCH))
    assert phases.steps == [*first_epoch, PER_EPOCH + 4, PER_EPOCH + 9]
    assert not optimizer.coverage().missed


def test_callback_adds_plain_numbers_to_the_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = gpt2()
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, disable_tqdm=False),
        train_dataset=text(model),
        optimizers=(FNGD(model, sharing="ranked", lr=1e-3), None),
        callbacks=[FNGDCallback()],
    )
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = ("fngd_phase", "fngd_lambda", "fngd_rho", "fngd_weight_spread")
    assert all(type(entry[name]) is float for entry in entries for name in names)
    assert [entry["fngd_phase"] for entry in entries] == [0.0] * (PER_EPOCH - 1) + [1.0] * (2 * PER_EPOCH + 1)
    assert all(entry["fngd_rho"] > 0 and entry["fngd_lambda"] > 0 for entry in entries)
    assert "fngd_rho" in capsys.readouterr().out  # the progress bar's own line of the logs


def test_callback_measures_for_logs_of_epochs(tmp_path: Path) -> None:
    model = bert()
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, logging_strategy="epoch", logging_steps=500),
        train_dataset=text(model),
        optimizers=(FNGD(model, sharing="ranked", lr=1e-3, refresh=10), None),
        callbacks=[FNGDCallback()],
    )
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["fngd_phase"] for entry in entries] == [1.0] * EPOCHS
    assert len({entry["fngd_rho"] for entry in entries}) == EPOCHS


def test_callback_refuses_another_optimizer(tmp_path: Path) -> None:
    model = bert()
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=text(model), callbacks=[FNGDCallback()])
    with pytest.raises(ValueError, match="FNGDCallback needs FNGD"):
        trainer.train()


def test_factory_honours_arguments_and_config(tmp_path: Path) -> None:
    args = arguments(tmp_path, weight_decay=0.25, learning_rate=0.002, num_train_epochs=1)
    config = FNGDConfig.preset("robust", update="adam", lr=1.0)
    model = bert()
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=text(model),
        optimizer_cls_and_kwargs=(FNGDFactory, {"args": args, "config": config}),
        callbacks=[FNGDCallback()],
    )
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    first, *_, last = optimizer.param_groups
    assert (first["initial_lr"], first["weight_decay"], first["rule"]) == (0.002, 0.25, "adam")
    assert last["weight_decay"] == 0.0
    assert optimizer.preconditioner.damping == config.damping


def test_factory_makes_one_optimizer_a_model_init(tmp_path: Path) -> None:
    trainer = Trainer(
        model_init=bert,
        args=arguments(tmp_path, num_train_epochs=1),
        train_dataset=text(bert()),
        optimizer_cls_and_kwargs=(FNGDFactory, {"lr": 1e-3}),
    )
    trainer.train()
    first = trainer.optimizer.optimizer
    trainer.train()
    assert trainer.optimizer.optimizer is not first
    assert trainer.optimizer.optimizer.preconditioner.model is trainer.model


def test_class_in_place_of_the_factory_names_the_factory(tmp_path: Path) -> None:
    model = bert()
    trainer = Trainer(
        model=model, args=arguments(tmp_path), train_dataset=text(model), optimizer_cls_and_kwargs=(FNGD, {"lr": 1e-3})
    )
    with pytest.raises(TypeError, match="FNGDFactory"):
        trainer.train()


def test_from_training_args(tmp_path: Path) -> None:
    args = arguments(tmp_path, learning_rate=0.004, weight_decay=0.5)
    optimizer = FNGD.from_training_args(bert(), args)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.004, 0.5)
    with pytest.warns(UserWarning, match="max_grad_norm=0"):
        FNGD.from_training_args(bert(), args, FNGDConfig.preset("paper"))
    args.max_grad_norm = 0.0
    paper = FNGD.from_training_args(bert(), args, FNGDConfig.preset("paper"))
    assert [group["rule"] for group in paper.param_groups] == ["momentum"] * 4
    assert paper.param_groups[0]["lr"] == 0.004


def test_index_column_follows_the_samples_and_never_reaches_the_model(tmp_path: Path) -> None:
    model = bert()
    optimizer = FNGD(model, lr=1e-3, sharing="index", refresh=0, damping=0.01)
    data = add_index(text(model))
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, remove_unused_columns=False, eval_strategy="epoch"),
        train_dataset=data,
        eval_dataset=data,
        optimizers=(optimizer, None),
    )
    trainer.train()
    policy = optimizer.preconditioner.policy
    assert isinstance(policy, IndexSharing)
    assert policy.table is not None
    assert policy.table.shape[1] >= SAMPLES
    assert (policy.table[:, :SAMPLES] != 1).any(dim=0).all()  # every sample was weighted in the first epoch


def test_index_without_the_column_names_the_helper(tmp_path: Path) -> None:
    model = bert()
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=text(model),
        optimizers=(FNGD(model, sharing="index"), None),
    )
    with pytest.raises(ValueError, match="add_index"):
        trainer.train()


class Save(TrainerCallback):
    """Saves in the first epoch, and in the second one."""

    steps = (4, 11)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step in self.steps


@pytest.mark.parametrize("sharing", ["ranked", "replay", "last", "never", "clipped"])
def test_resumed_runs_equal_the_uninterrupted_one(sharing: str, tmp_path: Path) -> None:
    def train(folder: str, resume: Path | None = None) -> PreTrainedModel:
        model = bert()
        optimizer = FNGD(model, lr=3e-3, update="momentum", sharing=sharing, refresh=3, damping=0.01)
        trainer = Trainer(
            model=model,
            args=arguments(tmp_path / folder),
            train_dataset=text(model),
            optimizers=(optimizer, None),
            callbacks=[Save()],
        )
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return model

    whole = train("whole").state_dict()
    for stop in Save.steps:
        checkpoint = tmp_path / "whole" / f"checkpoint-{stop}"
        state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        assert state["param_groups"][0]["fngd"]["engine"]["sharing"] == sharing
        resumed = train(f"resumed-{stop}", checkpoint).state_dict()
        for name, value in whole.items():
            assert torch.equal(value, resumed[name]), name
