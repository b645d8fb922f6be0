"""From a model and tokenized splits to scores and an output folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from common.optimizers import what_trained
from common.run import Run
from common.trainer import RecipeTrainer
from text.card import SCORES, render_card
from text.data import longest_first
from text.plot import plot_learning_curve
from text.trainer import FIRST, FirstEpoch, TextTrainer


def train_and_score(
    run: Run,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    splits: DatasetDict,
    facts: dict[str, Any],
    *,
    trainer_cls: type[TextTrainer] = TextTrainer,
    callbacks: Sequence[TrainerCallback] = (),
    first_epoch: bool = False,
    measure: Callable[[], dict[str, Any]] | None = None,
    **trainer_kwargs: Any,
) -> dict[str, Any]:
    """Train, score, and write the output folder.

    Args:
        run: What `common.run.prepare` returned.
        model: The model to train.
        tokenizer: Its tokenizer, which is saved with it.
        splits: train, validation and test, tokenized, and other test sets, scored as "predict_NAME".
        facts: What all_results.json is to hold of model and data; the card wants the names of the recipe, its task
            and its dataset among them.
        trainer_cls: The Trainer.
        callbacks: Callbacks beside the optimizer's.
        first_epoch: Whether the test split is scored after one epoch as well.
        measure: What else is measured at the end, to be reported.
        **trainer_kwargs: Collator, loss, metrics.

    Returns:
        What all_results.json holds.
    """
    args = run.args
    held_out = {name: longest_first(rows) for name, rows in splits.items() if name != "train"}
    more = [name for name in held_out if name not in ("validation", "test")]
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    report: dict[str, Any] = facts | {
        "model": type(whole).__name__,
        "parameters": model.num_parameters(only_trainable=True),
        "train_samples": len(splits["train"]),
        "test_sets": more,
        "seed": args.seed,
    }
    trainer = trainer_cls(
        optimizer_cls_and_kwargs=run.optimizer,
        render_card=lambda: render_card(report | what_trained(trainer.optimizer), args),
        model=model,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=held_out["validation"],
        processing_class=tokenizer,
        callbacks=[*run.callbacks, *callbacks],
        **trainer_kwargs,
    )
    if first_epoch:
        trainer.add_callback(FirstEpoch(trainer, held_out["test"]))
    report |= run.train(trainer)
    if trainer.averaged:
        report["averaged_checkpoints"] = trainer.averaged
    if whole is not model and trainer.is_world_process_zero():
        whole.config.save_pretrained(args.output_dir)  # adapters come without the names of the classes
    if trainer.state.global_step < trainer.state.max_steps:
        report["stopped_at"] = trainer.state.epoch
    for event in trainer.state.log_history:
        report |= {key: item for key, item in event.items() if key.startswith((FIRST, "skipped_steps"))}
    if args.do_eval:
        report |= trainer.score(held_out["validation"], "eval")
    if args.do_predict:
        report |= trainer.score(held_out["test"], "predict")
        for name in more:
            report |= trainer.score(held_out[name], f"predict_{name}")
        best = trainer.state.best_model_checkpoint
        if best is not None and not args.load_best_model_at_end:
            with trainer.weights_of(best):
                report |= trainer.score(held_out["test"], "best_predict")
    if measure is not None:
        report |= measure()
    finish(trainer, report)
    return report


def finish(trainer: RecipeTrainer, report: dict[str, Any]) -> None:
    """Write the report, the card and the learning curve, print the scores, and push where the arguments say so."""
    args = trainer.args
    trainer.save_metrics("all", report, combined=False)
    trainer.create_model_card()
    if trainer.is_world_process_zero():
        curve = Path(args.output_dir, "learning_curve.png")
        plot_learning_curve(trainer.state.log_history, curve, f"{report['optimizer']}, {report['recipe']}")
        prefixes = ["eval", "predict", *(f"predict_{name}" for name in report["test_sets"])]
        for name in (f"{prefix}_{metric}" for prefix in prefixes for metric in SCORES):
            if name in report:
                signature = report.get(f"{name}_signature")
                print(f"{name}: {report[name]:.4g}" + (f" ({signature})" if signature else ""))
    if args.push_to_hub:
        trainer.push_to_hub()
