"""One run of a recipe: from the checkpoint that it goes on from to what it reports of the training."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments, enable_full_determinism, set_seed

from common.arguments import OptimizerArguments
from common.optimizers import describe, fngd_config, optimizer_cls_and_kwargs
from common.trainer import RecipeTrainer
from hf_fngd import FNGDCallback, FNGDConfig, last_complete_checkpoint


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
        report |= describe(trainer.optimizer, self.config) | trainer.timer.report()
        trainer.save_model()
        trainer.save_state()
        return report


def prepare(optimizer_args: OptimizerArguments, args: TrainingArguments, overwrite: bool) -> Run:
    """Check the optimizer's options, and look for a checkpoint; `overwrite` deletes those of an earlier run."""
    config = fngd_config(optimizer_args, args)
    optimizer = optimizer_cls_and_kwargs(optimizer_args, config, args)
    checkpoint = find_checkpoint(args, overwrite)
    if checkpoint is not None and args.process_index == 0:
        print(f"Resuming from {checkpoint}; --overwrite_output_dir starts anew.")
    return Run(args, config, optimizer, checkpoint)


def find_checkpoint(args: TrainingArguments, overwrite: bool) -> str | None:
    """Return the checkpoint to resume from: the one that was named, or the last complete one in the output folder.

    Args:
        args: `output_dir` and `resume_from_checkpoint`: a folder, or "true" for the last one in `output_dir`, which
            must exist then and be complete.
        overwrite: Delete the folder's checkpoints, so that none is resumed, now or after an interruption.

    Raises:
        ValueError: A checkpoint was asked for and there is none.
    """
    named, output_dir = args.resume_from_checkpoint, Path(args.output_dir)
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
