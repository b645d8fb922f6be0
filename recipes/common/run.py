"""One run of a recipe: from the checkpoint that it goes on from to what it reports of the training."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments, enable_full_determinism, set_seed

from common.arguments import DatasetArguments, OptimizerArguments
from common.data import shown
from common.optimizers import fngd_config, optimizer_cls_and_kwargs, what_trained
from common.trainer import RecipeTrainer
from hf_fngd import FNGDCallback, FNGDConfig, last_complete_checkpoint
from hf_fngd.config import PRESETS

OPTIONS = "options.json"
"""The file in the output folder with the options that decide what is trained."""
RESULTS = "all_results.json"
"""The file in the output folder with what a finished run reports."""
# TrainingArguments that change the training. All others may differ where a run resumes.
_OF_TRAINING = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "decay_at", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing_factor", "seed", "data_seed"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "train_sampling_strategy", "dataloader_drop_last"),
    *("bf16", "fp16", "skip_above", "neftune_noise_alpha"),
)
# Other options that do not change it.
_OF_SCORING = (
    *("overwrite_output_dir", "preprocessing_num_workers", "max_eval_samples", "max_predict_samples"),
    *("max_test_samples", "test_split", "test_sets", "num_beams", "forgetting_dataset", "forgetting_samples"),
    *("forgetting_text_column", "forgetting_label_column"),
)


@dataclass(frozen=True)
class Run:
    """What is known before there are data and a model.

    Attributes:
        args: The training arguments.
        config: FNGD's configuration; None for any other optimizer.
        optimizer: What `Trainer(optimizer_cls_and_kwargs=...)` takes.
        checkpoint: The checkpoint to go on from; None at the start.
    """

    args: TrainingArguments
    config: FNGDConfig | None
    optimizer: tuple[Any, dict[str, Any]] | None
    checkpoint: str | None

    @property
    def callbacks(self) -> list[TrainerCallback]:
        """The callbacks that the optimizer wants."""
        return [] if self.config is None else [FNGDCallback()]

    def seed(self) -> None:
        """Seed all generators, before the model is initialized."""
        enable_full_determinism(self.args.seed) if self.args.full_determinism else set_seed(self.args.seed)

    def train(self, trainer: RecipeTrainer) -> dict[str, Any]:
        """Train, save the model and the Trainer's state, and return what is to be reported of the training."""
        report = trainer.train(resume_from_checkpoint=self.checkpoint).metrics
        if self.checkpoint is not None:
            report = {}  # Trainer divides the loss and the time of the rest by the steps of the whole run
        report |= what_trained(trainer.optimizer) | trainer.timer.report()
        trainer.save_model()
        trainer.save_state()
        return report


def prepare(parsed: tuple[Any, ...]) -> Run:
    """Check the optimizer's options, and look for a checkpoint of the same training.

    Args:
        parsed: What `common.arguments.parse` returned: options of data and optimizer, TrainingArguments, and others.

    Raises:
        ValueError: The folder holds another training, or one was asked for and there is none.
    """
    args = next(group for group in parsed if isinstance(group, TrainingArguments))
    optimizer_args = next(group for group in parsed if isinstance(group, OptimizerArguments))
    overwrite = any(isinstance(group, DatasetArguments) and group.overwrite_output_dir for group in parsed)
    config = fngd_config(optimizer_args, args)
    optimizer = optimizer_cls_and_kwargs(optimizer_args, config, args)
    checkpoint, options = find_checkpoint(args, overwrite), training_options(parsed, config)
    if checkpoint is None:
        if Path(args.output_dir, RESULTS).exists() and not overwrite:
            check_same(Path(args.output_dir, OPTIONS), options)
        if args.process_index == 0:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            Path(args.output_dir, OPTIONS).write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
    else:
        check_same(Path(checkpoint).parent / OPTIONS, options)
        if args.process_index == 0:
            print(f"Resuming from {checkpoint}; --overwrite_output_dir starts anew.")
    return Run(args, config, optimizer, checkpoint)


def training_options(parsed: tuple[Any, ...], config: FNGDConfig | None = None) -> dict[str, Any]:
    """Return what decides the training, in types that JSON knows; with FNGD's configuration where a file has it."""
    found = {}
    for group in parsed:
        for field in dataclasses.fields(group):
            wanted = field.name in _OF_TRAINING if isinstance(group, TrainingArguments) else field.init
            if wanted and field.name not in _OF_SCORING:
                found[field.name] = getattr(group, field.name)
        if isinstance(group, TrainingArguments):
            found["processes"] = group.world_size
    if config is not None and found["fngd_config"] not in (None, *PRESETS):
        found["fngd"] = config.to_dict()  # the file may have changed
    for name in ("dataset_name", "model_name_or_path", "fngd_config"):
        if found.get(name) is not None:
            found[name] = shown(found[name])
    return dict(json.loads(json.dumps(found, default=lambda value: getattr(value, "value", str(value)))))


def check_same(file: Path, options: dict[str, Any]) -> None:
    """Raise a ValueError where a file of options, if it exists, has other values of these."""
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    differ = [name for name in options if name in before and before[name] != options[name]]
    if differ:
        changes = ", ".join(f"{name} was {before[name]!r} and is {options[name]!r}" for name in differ)
        raise ValueError(
            f"{file.parent} holds another training: {changes}. Give the same options to go on with it, another "
            "--output_dir, or --overwrite_output_dir true to replace it."
        )


def find_checkpoint(args: TrainingArguments, overwrite: bool) -> str | None:
    """Return the checkpoint to resume from: the one that was named, or the last complete one in the output folder.

    Args:
        args: `output_dir` and `resume_from_checkpoint`: a folder, or "true" for the last one in `output_dir`, which
            must exist then and be complete.
        overwrite: Delete the folder's checkpoints, so that none is resumed, now or after an interruption.

    Raises:
        ValueError: A checkpoint was asked for, and there is none or all are to be deleted.
    """
    named, output_dir = args.resume_from_checkpoint, Path(args.output_dir)
    if named is not None and overwrite:
        raise ValueError("--resume_from_checkpoint goes on and --overwrite_output_dir starts anew: leave out one.")
    if named is not None and named.lower() != "true":
        if not Path(named).is_dir():
            raise ValueError(f"resume_from_checkpoint {named!r} is no folder.")
        return named
    with args.main_process_first(local=False, desc="looking for checkpoints"):
        if overwrite and args.process_index == 0:
            for folder in output_dir.glob("checkpoint-*"):
                shutil.rmtree(folder)
        last = last_complete_checkpoint(output_dir)
    if last is None and named is not None:
        raise ValueError(f"{output_dir} holds no complete checkpoint to resume from.")
    return last
