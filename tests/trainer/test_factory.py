"""FNGDFactory: what it builds, from which arguments, and what it says of those that it is not given."""

import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from hf_fngd import FNGDConfig, FNGDFactory, unwrap
from hf_fngd.weights.uniform import UniformSharing
from tests.modes.harness import arguments
from tests.modes.nets import LINEAR, bert

SAMPLES = 24


def trainer(folder: Path, given: dict[str, Any], **changes: Any) -> Trainer:
    return Trainer(
        model=LINEAR.make(),
        args=arguments(folder, num_train_epochs=1, **changes),
        train_dataset=LINEAR.data(SAMPLES),
        optimizer_cls_and_kwargs=(FNGDFactory, given),
    )


def test_factory_honours_arguments_and_config(tmp_path: Path) -> None:
    changes = {"weight_decay": 0.25, "learning_rate": 0.002}
    config = FNGDConfig.preset("paper", update="adam")
    run = trainer(tmp_path, {"args": arguments(tmp_path, **changes), "config": config}, **changes)
    run.train()
    optimizer = unwrap(run.optimizer)
    first, *_, last = optimizer.param_groups
    assert (first["initial_lr"], first["weight_decay"], first["rule"]) == (0.002, 0.25, "adam")
    assert last["weight_decay"] == 0.0
    assert optimizer.preconditioner.policy.damping == config.damping


def test_factory_takes_a_policy_of_ones_own(tmp_path: Path) -> None:
    run = trainer(tmp_path, {"sharing": UniformSharing(), "lr": 1e-3})
    run.train()
    assert isinstance(unwrap(run.optimizer).preconditioner.policy, UniformSharing)


def test_factory_makes_one_optimizer_a_model_init(tmp_path: Path) -> None:
    run = Trainer(
        model_init=lambda: bert(),  # which may not take arguments
        args=arguments(tmp_path, num_train_epochs=1),
        train_dataset=LINEAR.data(SAMPLES),
        optimizer_cls_and_kwargs=(FNGDFactory, {"lr": 1e-3}),
    )
    run.train()
    first = run.optimizer.optimizer
    run.train()
    assert run.optimizer.optimizer is not first
    assert run.optimizer.optimizer.preconditioner.model is run.model


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "learning_rate=0.002, weight_decay=0.25 of TrainingArguments has no effect: pass (FNGDFactory, "),
        ({"lr": 1e-3}, "so that weight_decay=0.25 of TrainingArguments has no effect"),
        ({"config": FNGDConfig(lr=0.002, weight_decay=0.25)}, None),
        ({"lr": 1e-3, "weight_decay": 0.1}, None),
    ],
    ids=["nothing", "lr", "the same in a config", "both"],
)
def test_arguments_that_the_factory_is_not_given_are_told(
    tmp_path: Path, given: dict[str, Any], expected: str | None
) -> None:
    run = trainer(tmp_path, given, weight_decay=0.25, learning_rate=0.002)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train()
    told = [str(one.message) for one in caught if "of TrainingArguments has no effect" in str(one.message)]
    assert len(told) == (expected is not None)
    assert expected is None or expected in told[0]
