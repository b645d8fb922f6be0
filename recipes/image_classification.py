"""Train an image classifier under label noise, from scratch, and measure what it learned and what it memorized.

    python recipes/image_classification.py --dataset_name uoft-cs/cifar10 --label_noise 0.4
    python recipes/image_classification.py --optimizer adamw --loss gce

Training and validation labels are equally noisy, test labels are clean. The output folder holds the model,
all_results.json, trainer_state.json with a curve of each, and sample_losses.pt. With `--save_strategy epoch` a run
that was interrupted resumes from its last checkpoint when it is started again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.nn import functional as F
from transformers import TrainingArguments, enable_full_determinism, set_seed

from common.checkpoints import find_checkpoint
from common.optimizers import callbacks, describe, fngd_config, optimizer_cls_and_kwargs
from images.arguments import parse_arguments
from images.data import Columns, load
from images.detection import detection, weight_scores
from images.folds import out_of_sample_logits, without_traces
from images.losses import TrainingLoss
from images.models import build_model
from images.record import LossRecord, largest_rise
from images.summary import best_epochs, memorized
from images.trainer import ImageTrainer, predicted


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, evaluate, and write the output folder.

    Args:
        argv: The command line behind the program's name; `sys.argv[1:]` where None.

    Returns:
        What all_results.json holds.
    """
    data_args, model_args, loss_args, optimizer_args, args = parse_arguments(argv)
    config = fngd_config(optimizer_args, args)
    optimizer = optimizer_cls_and_kwargs(optimizer_args, config, args)
    checkpoint = find_checkpoint(args, data_args.overwrite_output_dir)
    if checkpoint is not None and args.process_index == 0:
        print(f"Resuming from {checkpoint}; --overwrite_output_dir starts anew.")

    with args.main_process_first(desc="loading the dataset"):  # the other processes find the download
        splits = load(data_args, args.seed)

    def make_trainer(train: Columns, args: TrainingArguments) -> ImageTrainer:
        enable_full_determinism(args.seed) if args.full_determinism else set_seed(args.seed)
        record = LossRecord(len(splits.train))
        trainer = ImageTrainer(
            record=record,
            keeps_index=config is not None,
            model=build_model(model_args, data_args.image_size, splits.classes),
            args=args,
            train_dataset=train,
            eval_dataset={"noisy": splits.validation, "test": splits.test},
            compute_loss_func=TrainingLoss(
                loss_args, args.label_smoothing_factor, record, lambda: trainer.state.epoch or 0.0
            ),
            optimizer_cls_and_kwargs=optimizer,
            callbacks=callbacks(optimizer_args),
        )
        return trainer

    trainer = make_trainer(splits.train, args)
    if checkpoint is not None:
        trainer.load_record(checkpoint)
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    report: dict[str, Any] = {
        "dataset_name": data_args.dataset_name,
        "model": model_args.model,
        "loss_function": loss_args.loss,
        "parameters": trainer.model.num_parameters(),
        "train_samples": len(splits.train),
        "seed": args.seed,
    }
    if checkpoint is None:
        report |= metrics  # after resuming, Trainer divides the rest's loss and time by the steps of the whole run
    report |= describe(trainer.optimizer, config) | trainer.timer.report()
    report |= best_epochs(trainer.state.log_history) | {"largest_rise": largest_rise(trainer.record.batches)}
    trainer.save_model()
    trainer.save_state()

    report |= predicted(trainer, splits.validation, "eval_noisy")[1]
    report |= predicted(trainer, splits.test, "test")[1]
    logits = predicted(trainer, splits.train, "train")[0]
    labels = splits.train.columns["labels"]
    report |= memorized(logits, labels, splits.true_labels)
    scores = {"loss": F.cross_entropy(logits, labels, reduction="none"), "mean_loss": trainer.whole_record().means()}
    scores |= weight_scores(trainer.optimizer, len(labels))
    if data_args.folds:
        quiet = without_traces(args)
        unseen = out_of_sample_logits(splits.train, data_args.folds, lambda part: make_trainer(part, quiet))
        scores["self_confidence"] = F.cross_entropy(unseen, labels, reduction="none")
    for name, values in scores.items():
        report |= detection(name, values, splits.wrong)
    trainer.save_metrics("all", report, combined=False)
    if trainer.is_world_process_zero():
        for name in ("test_accuracy", "selected_test_accuracy", "best_test_accuracy", "wrong_fitted", "loss_auc"):
            if report.get(name) is not None:
                print(f"{name}: {report[name]:.4f}")
    return report


if __name__ == "__main__":
    main()
