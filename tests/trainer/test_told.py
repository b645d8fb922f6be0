"""What a Trainer is told when training begins, where something of its set-up would not reach FNGD."""

import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import Trainer
from transformers.trainer_utils import set_seed

from hf_fngd import FNGD, FNGDCallback, FNGDConfig, FNGDFactory, unwrap
from tests.modes.harness import arguments
from tests.modes.nets import LINEAR

ROWS = 24


def rows(**columns: Any) -> Dataset:
    data = LINEAR.data(ROWS)
    names = {name: [row[name] for row in data] for name in data[0]}
    return Dataset.from_dict(names | columns)


def trainer(folder: Path, data: Any, *, factory: bool = False, callbacks: Any = (), **changes: Any) -> Trainer:
    set_seed(0)
    model, args = LINEAR.make(), arguments(folder, num_train_epochs=1, **changes)
    given = (
        {"optimizer_cls_and_kwargs": (FNGDFactory, {"args": args})} if factory else {"optimizers": (FNGD(model), None)}
    )
    return Trainer(model=model, args=args, train_dataset=data, callbacks=[*callbacks], **given)


def test_ids_that_trainer_would_drop_are_an_error(tmp_path: Path) -> None:
    """Trainer reads the model's signature before the factory is called, and so drops the column."""
    data = rows(sample_ids=[n // 2 for n in range(ROWS)])
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        trainer(tmp_path, data, factory=True).train()
    assert trainer(tmp_path, data, factory=True, remove_unused_columns=False).train().global_step > 0
    trainer(tmp_path, data, callbacks=[FNGDCallback()]).train()  # there the column reaches FNGD

    class Narrow(Trainer):  # as PEFT's models are to Trainer
        def _set_signature_columns_if_needed(self) -> None:
            self._signature_columns = ["input_ids", "attention_mask", "labels"]

    model = LINEAR.make()
    given = {"optimizers": (FNGD(model), None), "callbacks": [FNGDCallback()]}
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        Narrow(model=model, args=arguments(tmp_path), train_dataset=data, **given).train()


def test_settings_that_fngd_does_not_see_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes = {"learning_rate": 0.002, "weight_decay": 0.25}
    told = "learning_rate=0.002, weight_decay=0.25 of TrainingArguments has no effect"
    trainer(tmp_path, LINEAR.data(ROWS), callbacks=[FNGDCallback()], **changes).train()
    assert told in caplog.text
    caplog.clear()
    trainer(tmp_path, LINEAR.data(ROWS), callbacks=[FNGDCallback()], factory=True, **changes).train()
    trainer(tmp_path, LINEAR.data(ROWS), callbacks=[FNGDCallback()], learning_rate=FNGDConfig().effective("lr")).train()
    assert "has no effect" not in caplog.text


def test_an_error_says_where_a_setting_comes_from(tmp_path: Path) -> None:
    args = arguments(tmp_path, adam_beta2=0.98, max_grad_norm=0)
    with pytest.raises(ValueError, match=r"beta2=0\.98 has no effect") as caught:
        FNGD.from_training_args(LINEAR.make(), args, FNGDConfig.preset("paper"))
    assert caught.value.__notes__ == ["It comes from adam_beta2 of TrainingArguments."]


@pytest.mark.parametrize(("sharing", "warns"), [("uniform", False), ("clipped", True)])
def test_batches_of_one_are_too_small_for_sample_weights_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, sharing: str, warns: bool
) -> None:
    model = LINEAR.make()
    args = arguments(tmp_path, per_device_train_batch_size=1, max_steps=2)
    optimizer = FNGD(model, sharing=sharing)
    Trainer(model=model, args=args, train_dataset=LINEAR.data(ROWS), optimizers=(optimizer, None)).train()
    assert ("holds one sample" in caplog.text) == warns


def test_a_callback_reports_in_each_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = FNGDCallback()
    for _ in range(2):
        trainer(tmp_path, LINEAR.data(ROWS), callbacks=[callback]).train()
        assert "FNGD preconditions" in capsys.readouterr().out


def test_a_learning_rate_set_after_loading_needs_the_schedulers_base(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The cure that the log names works, and nothing less does."""
    trainer(tmp_path, LINEAR.data(ROWS), save_strategy="steps", save_steps=2, lr_scheduler_type="constant").train()

    class Sets(FNGDCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_train_begin(args, state, control, **kwargs)
            for group in unwrap(kwargs["optimizer"]).param_groups:
                group["lr"] = group["initial_lr"] = 0.5
            kwargs["lr_scheduler"].base_lrs[:] = [0.5] * len(kwargs["lr_scheduler"].base_lrs)

    model = LINEAR.make()
    args = arguments(tmp_path, num_train_epochs=1, lr_scheduler_type="constant")
    run = Trainer(
        model=model,
        args=args,
        train_dataset=LINEAR.data(ROWS),
        optimizers=(FNGD(model, lr=0.5), None),
        callbacks=[Sets()],
    )
    with caplog.at_level(logging.WARNING):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "and for lr in the scheduler's base_lrs" in caplog.text
    assert {group["lr"] for group in unwrap(run.optimizer).param_groups} == {0.5}
