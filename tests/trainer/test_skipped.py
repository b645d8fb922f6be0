"""Steps that are skipped in Trainer's runs: they are counted in the logs, and end epochs as others do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from hf_fngd import FNGD, FNGDCallback
from tests.modes.harness import arguments
from tests.modes.nets import bert, classification_data


class Spoilt(Trainer):
    """Some of its batches, counted from one, have no finite loss."""

    batches = 0
    spoilt: tuple[int, ...] = ()

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.batches += 1
        value = super().compute_loss(*args, **kwargs)
        return value * torch.nan if self.batches in self.spoilt else value


def spoilt(folder: Path, batches: tuple[int, ...], callback: bool, **changes: Any) -> tuple[Spoilt, FNGD]:
    """Two epochs of three batches."""
    model = bert()
    optimizer = FNGD(model, sharing="replay")
    trainer = Spoilt(
        model=model,
        args=arguments(folder, logging_strategy="steps", logging_steps=1, **changes),
        train_dataset=classification_data(12),
        optimizers=(optimizer, None),
        callbacks=[FNGDCallback()] if callback else [],
    )
    trainer.spoilt = batches
    trainer.train()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    return trainer, optimizer


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_the_callback_logs_how_many_steps_were_skipped(max_grad_norm: float, tmp_path: Path) -> None:
    trainer, optimizer = spoilt(tmp_path, (2, 5), callback=True, max_grad_norm=max_grad_norm)
    logged = [entry["fngd_skipped"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [0, 1, 1, 1, 2, 2]
    assert optimizer.preconditioner.policy.steps == 4
    assert optimizer.preconditioner.policy.shared_since == 2


@pytest.mark.parametrize("callback", [False, True])
def test_an_epoch_ends_with_its_last_step_even_if_that_is_skipped(callback: bool, tmp_path: Path) -> None:
    _, optimizer = spoilt(tmp_path, (3,), callback)
    assert int(optimizer.skipped) == 1
    assert optimizer.preconditioner.policy.steps == 5
    assert optimizer.preconditioner.policy.shared_since == 2
