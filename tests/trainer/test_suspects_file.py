"""FNGDCallback writes which samples got low weights."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from hf_fngd import FNGD, FNGDCallback, add_index
from tests.trainer.test_trainer import SAMPLES, arguments, bert, text


def trainer(folder: Path, suspects: Any, sharing: str = "index", **changes: Any) -> Trainer:
    model = bert()
    return Trainer(
        model=model,
        args=arguments(folder, remove_unused_columns=False, num_train_epochs=1, **changes),
        train_dataset=add_index(text(model)),
        optimizers=(FNGD(model, sharing=sharing), None),
        callbacks=[FNGDCallback(suspects=suspects)],
    )


@pytest.mark.parametrize("absolute", [False, True])
def test_a_file_is_written_at_the_end(absolute: bool, tmp_path: Path) -> None:
    path = tmp_path / "elsewhere" / "suspects.csv" if absolute else Path("suspects.csv")
    run = trainer(tmp_path / "output", path)
    run.train()
    with (tmp_path / "output" / path).open(newline="") as file:  # an absolute path stays what it is
        lines = list(csv.DictReader(file))
    found = run.optimizer.optimizer.suspects()
    assert [int(line["index"]) for line in lines] == found.index.tolist()
    assert [float(line["weight"]) for line in lines] == found.weight.tolist()
    assert sorted(found.index.tolist()) == list(range(SAMPLES))
    assert {line["count"] for line in lines} == {"1"}


def test_only_the_main_process_writes_it(tmp_path: Path) -> None:
    run = trainer(tmp_path, "suspects.csv", max_steps=1)
    run.train()
    path = tmp_path / "suspects.csv"
    for main in (False, True):
        path.unlink(missing_ok=True)
        run.state.is_world_process_zero = main
        run.callback_handler.on_train_end(run.args, run.state, run.control)
        assert path.exists() == main


def test_another_policy_is_refused_before_training_begins(tmp_path: Path) -> None:
    run = trainer(tmp_path, "suspects.csv", sharing="ranked")
    with pytest.raises(ValueError, match="sharing='ranked': use sharing=\"index\""):
        run.train()
    assert run.state.global_step == 0
