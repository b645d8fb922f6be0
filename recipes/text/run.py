"""One run: from the checkpoint that it goes on from to the scores that it ends with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    enable_full_determinism,
    set_seed,
)

from common.arguments import OptimizerArguments
from common.checkpoints import find_checkpoint
from common.optimizers import callbacks, describe, fngd_config, optimizer_cls_and_kwargs
from common.trainer import LENGTH, TextTrainer
from hf_fngd import FNGDConfig, add_index
from text.arguments import TextArguments
from text.card import render_card


@dataclass(frozen=True)
class Run:
    """What is known before there are data and a model.

    Attributes:
        args: The training arguments.
        config: FNGD's configuration; None for any other optimizer.
        optimizer: What `Trainer(optimizer_cls_and_kwargs=...)` takes.
        callbacks: What the optimizer wants.
        checkpoint: The checkpoint to go on from; None at the start.
    """

    args: TrainingArguments
    config: FNGDConfig | None
    optimizer: tuple[Any, dict[str, Any]] | None
    callbacks: list[TrainerCallback]
    checkpoint: str | None

    def seed(self) -> None:
        """Seed all generators, before the model is initialized."""
        enable_full_determinism(self.args.seed) if self.args.full_determinism else set_seed(self.args.seed)


def prepare(data_args: TextArguments, optimizer_args: OptimizerArguments, args: TrainingArguments) -> Run:
    """Check the optimizer's options, and look for a checkpoint."""
    config = fngd_config(optimizer_args, args)
    optimizer = optimizer_cls_and_kwargs(optimizer_args, config, args)
    checkpoint = find_checkpoint(args, data_args.overwrite_output_dir)
    if checkpoint is not None and args.process_index == 0:
        print(f"Resuming from {checkpoint}; --overwrite_output_dir starts anew.")
    return Run(args, config, optimizer, callbacks(optimizer_args), checkpoint)


def train_and_score(
    run: Run,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    splits: Mapping[str, Dataset],
    facts: dict[str, Any],
    *,
    trainer_cls: type[TextTrainer] = TextTrainer,
    fitted: bool = False,
    **trainer_kwargs: Any,
) -> dict[str, Any]:
    """Train, score, and write the output folder.

    Args:
        run: What `prepare` returned.
        model: The model to train.
        tokenizer: Its tokenizer, which is saved with it.
        splits: train, validation and test, tokenized.
        facts: What all_results.json is to hold of model and data.
        trainer_cls: The Trainer.
        fitted: Score the training split too, as fitted_loss and so on.
        **trainer_kwargs: Collator, loss, metrics.

    Returns:
        What all_results.json holds.
    """
    args, config = run.args, run.config
    held_out = {prefix: _longest_first(splits[name]) for prefix, name in _held_out(args).items()}
    train = splits["train"]
    report: dict[str, Any] = facts | {
        "model": type(model).__name__,
        "parameters": model.num_parameters(only_trainable=True),
        "train_samples": len(train),
        "seed": args.seed,
    }
    trainer = trainer_cls(
        optimizer_cls_and_kwargs=run.optimizer,
        render_card=lambda: render_card(report | describe(trainer.optimizer, config), args),
        model=model,
        args=args,
        train_dataset=add_index(train) if config is not None and config.sharing == "index" else train,
        eval_dataset=_longest_first(splits["validation"]),
        processing_class=tokenizer,
        callbacks=run.callbacks,
        **trainer_kwargs,
    )
    metrics = trainer.train(resume_from_checkpoint=run.checkpoint).metrics
    if run.checkpoint is None:
        report |= metrics  # after resuming, Trainer divides the rest's loss and time by the steps of the whole run
    report |= describe(trainer.optimizer, config) | trainer.timer.report()
    trainer.save_model()
    trainer.save_state()
    if fitted:
        held_out["fitted"] = train
    for prefix, rows in held_out.items():
        report |= trainer.predict(rows, metric_key_prefix=prefix).metrics
    best = trainer.state.best_model_checkpoint
    if "predict" in held_out and best is not None and not args.load_best_model_at_end:
        with trainer.weights_of(best):
            report |= trainer.predict(held_out["predict"], metric_key_prefix="best_predict").metrics
    trainer.save_metrics("all", report, combined=False)
    trainer.create_model_card()
    if args.push_to_hub:
        trainer.push_to_hub()
    return report


def _held_out(args: TrainingArguments) -> dict[str, str]:
    """Return the splits to score at the end, by the prefixes of their metrics."""
    wanted = {"eval": ("validation", args.do_eval), "predict": ("test", args.do_predict)}
    return {prefix: name for prefix, (name, do) in wanted.items() if do}


def _longest_first(rows: Dataset) -> Dataset:
    """Sort rows so that batches of like lengths waste little padding."""
    lengths = list(rows[LENGTH])
    return rows.select(sorted(range(len(lengths)), key=lambda row: -lengths[row]))
