"""FNGD under the Hugging Face Trainer."""

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers.trainer
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from hf_fngd import FNGD, FNGDCallback, FNGDConfig, FNGDFactory, policy_names, unwrap
from hf_fngd.trainer.card import amended
from tests.modes.harness import Stream
from tests.modes.harness import arguments as quiet
from tests.modes.nets import KINDS, LINEAR, Kind, bert, classification_data
from tests.nets import UPDATES_OF, settings_of
from tests.steps import assert_equal

SAMPLES, BATCH, EPOCHS = 24, 4, 3
PER_EPOCH = SAMPLES // BATCH
TOLD = (FNGDCallback,)


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    return quiet(folder, **({"num_train_epochs": EPOCHS, "logging_strategy": "steps", "logging_steps": 1} | changes))


def trainer(
    folder: Path, kind: Kind = LINEAR, callbacks: Any = TOLD, made: Any = None, fngd: Any = None, **changes: Any
) -> Trainer:
    """On a model of its own, with FNGD of these arguments, or whatever ``made`` passes to Trainer."""
    model = kind.make()
    made = {"optimizers": (FNGD(model, **(fngd or {})), None)} if made is None else made
    args = arguments(folder, **changes)
    return Trainer(model=model, args=args, train_dataset=kind.data(SAMPLES), callbacks=[*callbacks], **made)


def logged(trainer: Trainer) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("sharing", policy_names())
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_trains_without_a_callback(kind: Kind, sharing: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, kind, (), fngd={"lr": 3e-2, "sharing": sharing})
    run.train()
    losses = [entry["loss"] for entry in logged(run)]
    assert sum(losses[-PER_EPOCH:]) < 0.9 * sum(losses[:PER_EPOCH])
    optimizer = run.optimizer.optimizer
    assert not optimizer.coverage().missed
    if sharing == "replay":
        assert optimizer.preconditioner.policy.shared_since == PER_EPOCH


NAMES = {
    "clipped": {"weight_spread", "largest_norm", "skipped"},
    "uniform": {"skipped"},
    "never": {"rho", "lambda", "weight_spread", "skipped"},
    "replay": {"phase", "rho", "lambda", "weight_spread", "skipped"},
}


@pytest.mark.parametrize("sharing", policy_names())
def test_callback_adds_plain_numbers_to_the_logs(
    sharing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trainer(tmp_path, fngd={"lr": 1e-3, "sharing": sharing}, disable_tqdm=sharing != "replay")
    run.train()
    for entry in logged(run):
        found = {key.removeprefix("fngd_"): value for key, value in entry.items() if key.startswith("fngd_")}
        assert set(found) == NAMES[sharing]
        assert all(type(value) is float and value >= 0 for value in found.values())
    printed = capsys.readouterr().out
    assert printed.count("FNGD preconditions") == 1
    if sharing == "replay":
        assert [entry["fngd_phase"] for entry in logged(run)] == [0.0] * (PER_EPOCH - 1) + [1.0] * (2 * PER_EPOCH + 1)
        assert all(entry["fngd_rho"] > 0 and entry["fngd_lambda"] > 0 for entry in logged(run))
        assert "fngd_rho" in printed  # the progress bar's own line of the logs


def test_callback_measures_for_logs_of_epochs(tmp_path: Path) -> None:
    changes = {"logging_strategy": "epoch", "logging_steps": 500}
    run = trainer(tmp_path, fngd={"lr": 1e-3, "sharing": "never"}, **changes)
    run.train()
    assert len({entry["fngd_rho"] for entry in logged(run)}) == len(logged(run)) == EPOCHS


class Told(FNGDCallback):
    """Keeps what the optimizer says after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.said: dict[int, dict[str, float]] = {}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_optimizer_step(args, state, control, **kwargs)
        self.said[state.global_step + 1] = unwrap(kwargs["optimizer"]).diagnostics()


def test_no_log_has_the_values_of_another_step(tmp_path: Path) -> None:
    """Where the end of an epoch cannot be seen: an iterable dataset of an odd number of batches, accumulated."""
    rows, told = classification_data(20), Told()
    args = arguments(tmp_path, logging_strategy="epoch", max_steps=7, gradient_accumulation_steps=2)
    model = bert()
    run = Trainer(model, args, train_dataset=Stream(list(rows)), optimizers=(FNGD(model), None), callbacks=[told])
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logs) > 2
    for number, entry in enumerate(logs):
        said = told.said[entry["step"]]
        found = {name.removeprefix("fngd_"): value for name, value in entry.items() if name.startswith("fngd_")}
        assert found == (said if number else {"skipped": 0.0})


def test_callback_refuses_another_optimizer(tmp_path: Path) -> None:
    run = trainer(tmp_path, made={})
    with pytest.raises(TypeError, match=r"there is no FNGD in this AcceleratedOptimizer, but AdamW: pass optimizers="):
        run.train()


def test_class_in_place_of_the_factory_names_the_factory(tmp_path: Path) -> None:
    run = trainer(tmp_path, callbacks=(), made={"optimizer_cls_and_kwargs": (FNGD, {"lr": 1e-3})})
    with pytest.raises(TypeError, match="FNGDFactory"):
        run.train()


NO_OPTIMIZERS = [
    ((FNGD, None), r"class FNGD, and no optimizer: pass optimizers=\(FNGD\(model\), None\)"),
    ((FNGDFactory, None), r"no optimizer: pass optimizer_cls_and_kwargs="),
    ((FNGDFactory(), None), r"no optimizer: pass optimizer_cls_and_kwargs="),
    ((FNGDFactory, {"lr": 1e-3}), r"no optimizer: pass optimizer_cls_and_kwargs="),
]


@pytest.mark.parametrize(("given", "message"), NO_OPTIMIZERS)
def test_what_is_no_optimizer_in_its_place_names_the_cure(given: Any, message: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, callbacks=(), made={"optimizers": given})
    with pytest.raises(AttributeError, match=message):
        run.train()
    with pytest.raises(TypeError, match=r"no FNGD in this .*FNGD.*: pass optimizers=\(FNGD\(model\), None\)"):
        unwrap(given[0])


def test_from_training_args(tmp_path: Path) -> None:
    args = arguments(tmp_path, learning_rate=0.004, weight_decay=0.5, max_grad_norm=1.0)
    optimizer = FNGD.from_training_args(bert(), args)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.004, 0.5)
    with pytest.warns(UserWarning, match="max_grad_norm=0"):
        FNGD.from_training_args(bert(), args, FNGDConfig.preset("paper"))
    args.max_grad_norm = 0.0
    paper = FNGD.from_training_args(bert(), args, FNGDConfig.preset("paper"))
    assert [group["rule"] for group in paper.param_groups] == ["momentum"] * 4
    assert paper.param_groups[0]["lr"] == 0.004


@pytest.mark.parametrize(
    "by", [FNGD.from_training_args, lambda *args: FNGDFactory()(args[0], args=args[1], config=args[2])]
)
def test_what_is_set_wins_over_what_is_a_default(by: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def made(config: FNGDConfig | str | None = None, **changes: Any) -> dict[str, Any]:
        args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, **changes)
        return by(bert(), args, config).settings.values()

    config = FNGDConfig(lr=0.25, weight_decay=0.5, momentum=0.5, beta2=0.75, eps=1e-3)
    for name, value in made(config).items():
        assert value == getattr(config, name)
    assert made(config, learning_rate=0.25)["lr"] == 0.25
    assert "default of TrainingArguments" not in caplog.text
    assert made()["lr"] == made("default")["lr"] == 1e-3
    assert "learning_rate=5e-05 is the default of TrainingArguments, which nobody chose" in caplog.text
    assert "FNGD takes its own, lr=0.001. Set learning_rate" in caplog.text
    assert made(FNGDConfig(), learning_rate=0.5)["lr"] == 0.5
    with pytest.raises(ValueError, match=r"TrainingArguments has learning_rate=0\.5 and the config has lr=0\.001"):
        made(FNGDConfig(lr=1e-3), learning_rate=0.5)  # what the default stands for, but written down
    set_there = {"learning_rate": 1.0, "weight_decay": 2.0}
    set_there |= {"adam_beta1": 0.25, "adam_beta2": 0.5, "adam_epsilon": 0.125}
    found = made(**set_there)
    assert [found[name] for name in ("lr", "weight_decay", "momentum", "beta2", "eps")] == list(set_there.values())
    for name, value in set_there.items():
        with pytest.raises(ValueError, match=rf"TrainingArguments has {name}={value} and the config has .*=0"):
            made(config, **{name: value})


class Reporter(TrainerCallback):
    """In TensorBoard's place: Trainer puts it before the callbacks of users."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


@pytest.mark.parametrize("later", [False, True])
def test_reporters_see_the_values(later: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reporters: list[Reporter] = []
    monkeypatch.setattr(Reporter, "on_train_begin", lambda self, *args, **kwargs: reporters.append(self))
    monkeypatch.setattr("transformers.trainer.DEFAULT_CALLBACKS", [*transformers.trainer.DEFAULT_CALLBACKS, Reporter])
    run = trainer(tmp_path, callbacks=() if later else TOLD, logging_steps=1)
    if later:
        run.add_callback(FNGDCallback)
    run.train()
    (reporter,) = reporters
    losses = [logs for logs in reporter.logs if "loss" in logs]
    assert losses
    assert all(logs["fngd_skipped"] == 0 and logs["fngd_weight_spread"] > 0 for logs in losses)


def test_checkpoints_have_the_settings(tmp_path: Path) -> None:
    run = trainer(tmp_path, fngd={"lr": 3e-3, "momentum": 0.8}, save_strategy="epoch")
    run.train()
    checkpoints = list(tmp_path.glob("checkpoint-*"))
    assert checkpoints
    for checkpoint in checkpoints:
        assert FNGDConfig.from_pretrained(checkpoint) == unwrap(run.optimizer).config


@pytest.mark.parametrize("optim", [{}, {"optim": "adafactor", "optim_args": "decay_rate=-0.5,warmup_init=False"}])
def test_the_model_card_has_the_settings(optim: dict[str, str], tmp_path: Path) -> None:
    run = trainer(tmp_path, fngd={"lr": 3e-3, "momentum": 0.8}, num_train_epochs=1, **optim)
    run.train()
    run.train()
    run.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    lines = [line for line in card.splitlines() if line.startswith(("- optimizer", "- learning", "- lr_", "decay"))]
    assert lines == [
        "- learning_rate: 0.003",
        "- optimizer: FNGD of hf-fngd with lr=0.003, sharing='clipped', update='block_muon', momentum=0.8; "
        "all settings are in fngd_config.json",
        "- lr_scheduler_type: linear",
    ]
    assert "# mine" in card
    assert FNGDConfig.from_pretrained(tmp_path) == unwrap(run.optimizer).config
    (tmp_path / "README.md").unlink()
    with mock.patch.object(run, "init_hf_repo"), mock.patch("transformers.trainer.hf_api") as api:
        run.push_to_hub()
    assert api.return_value.upload_folder.called
    assert lines[1] in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_card_of_another_kind_gets_a_section_or_stays() -> None:
    optimizer = FNGD(model := bert(), lr=3e-3)
    line = "- optimizer: FNGD of hf-fngd with lr=0.003, sharing='clipped', update='block_muon'; all settings are in "
    assert amended("# A", optimizer) == f"# A\n\n### Optimizer\n\n{line}fngd_config.json\n\n"
    framed = amended("# A\n\n### Framework versions\n\n- B\n", optimizer)
    assert framed == f"# A\n\n### Optimizer\n\n{line}fngd_config.json\n\n### Framework versions\n\n- B\n"
    assert amended("- optimizer: **FNGD**, as below\n- seed: 1\n", optimizer).startswith("- optimizer: **FNGD**, as")
    assert model is optimizer.preconditioner.model


def test_a_card_that_is_written_for_another_optimizer_stays(tmp_path: Path) -> None:
    run = trainer(tmp_path, num_train_epochs=1)
    run.train()
    run.optimizer = torch.optim.AdamW(run.model.parameters())
    run.create_model_card()
    assert "FNGD" not in (tmp_path / "README.md").read_text(encoding="utf-8")


class Save(TrainerCallback):
    """Saves in the first epoch, and in the second one."""

    steps = (4, 11)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step in self.steps


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("sharing", policy_names())
def test_resumed_runs_equal_the_uninterrupted_one(sharing: str, accumulation: int, tmp_path: Path) -> None:
    def train(folder: str, resume: Path | None = None) -> PreTrainedModel:
        fngd = {"lr": 3e-3, "update": UPDATES_OF[sharing][-1], **settings_of(sharing, damping=0.01)}
        changes = {"per_device_train_batch_size": BATCH // accumulation, "gradient_accumulation_steps": accumulation}
        run = trainer(tmp_path / folder, callbacks=[Save()], fngd=fngd, **changes)
        run.train(resume_from_checkpoint=None if resume is None else str(resume))
        return run.model

    whole = train("whole").state_dict()
    for stop in Save.steps:
        checkpoint = tmp_path / "whole" / f"checkpoint-{stop}"
        state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        assert state["param_groups"][0]["fngd"]["engine"]["sharing"] == sharing
        resumed = train(f"resumed-{stop}", checkpoint).state_dict()
        for name, value in whole.items():
            assert torch.equal(value, resumed[name]), name


class Unfreezing(TrainerCallback):
    """Trains a model's encoder from the second epoch on."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.base_model.requires_grad_(state.epoch >= 1)


@pytest.mark.parametrize("stop", [PER_EPOCH - 2, PER_EPOCH + 2])
def test_an_encoder_that_is_unfrozen_after_the_first_epoch_and_a_run_that_resumes(stop: int, tmp_path: Path) -> None:
    def make() -> PreTrainedModel:
        model = bert()
        model.base_model.requires_grad_(False)
        return model

    kind = dataclasses.replace(LINEAR, make=make)
    options = {"callbacks": [Unfreezing()], "fngd": {"lr": 3e-2}, "save_strategy": "steps", "save_steps": stop}
    before = LINEAR.make().base_model.state_dict()
    whole, resumed = (trainer(tmp_path / name, kind, **options) for name in ("whole", "resumed"))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert_equal(whole.model, resumed.model)
    moved = [not torch.equal(p, before[name]) for name, p in whole.model.base_model.state_dict().items()]
    assert sum(moved) > len(moved) // 2
    assert unwrap(whole.optimizer).coverage().missed == {}
    assert len(logged(whole)) == EPOCHS * PER_EPOCH
