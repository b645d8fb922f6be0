"""Train an image classifier from scratch, on images of which some may be outsized.

    python recipes/image_classification.py --dataset_name uoft-cs/cifar10 --outliers 1
    python recipes/image_classification.py --optimizer adamw --unscaled 0.05
    python recipes/image_classification.py --dataset_name uoft-cs/cifar10 --model resnet --image_size 32 \
        --max_train_samples 50000 --augment true --lr_scheduler_type constant_with_warmup --decay_at 0.5 0.75

The output folder holds the model, all_results.json, and trainer_state.json with a curve of each measurement. With
`--save_strategy epoch` a run that was interrupted resumes from its last checkpoint when it is started again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.data import shown
from common.run import prepare
from images.arguments import parse_arguments
from images.data import Columns, load
from images.losses import TrainingLoss, largest_rise
from images.models import build_model
from images.trainer import ImageTrainer, best_epochs


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, evaluate, write the output folder, and return what all_results.json holds."""
    parsed = parse_arguments(argv)
    data_args, model_args, outlier_args, _, args = parsed
    run = prepare(parsed)
    with args.main_process_first(desc="loading the dataset"):  # the other processes find the download
        splits = load(data_args, args.seed_of_data)
    alone = len(splits.train) % args.train_batch_size == 1 and not args.dataloader_drop_last
    if alone and model_args.model == "vgg" and data_args.image_size < 32:
        raise ValueError(
            f"The last batch of {len(splits.train)} training images has one, of which vgg's batch norm sees one pixel "
            f"where image_size={data_args.image_size}: set --dataloader_drop_last true."
        )
    run.seed()
    loss = TrainingLoss(outlier_args, args.label_smoothing_factor)
    trainer = ImageTrainer(
        model=build_model(model_args, data_args.image_size, splits.classes),
        args=args,
        train_dataset=splits.train,
        eval_dataset={"validation": splits.validation, "test": splits.test},
        compute_loss_func=loss,
        optimizer_cls_and_kwargs=run.optimizer,
        callbacks=run.callbacks,
    )
    report: dict[str, Any] = {
        "dataset_name": shown(data_args.dataset_name),
        "model": model_args.model,
        "parameters": trainer.model.num_parameters(),
        "train_samples": len(splits.train),
        "seed": args.seed,
    }
    report |= run.train(trainer) | best_epochs(trainer.state.log_history)
    if run.checkpoint is None:  # a resumed run has seen a part of its batches alone
        report["largest_rise"] = largest_rise(loss.batches)
    if args.do_eval:
        report |= trainer.score(splits.validation, "eval_validation")
        as_they_are = Columns(**splits.train.columns)
        report["train_accuracy"] = trainer.score(as_they_are, "train")["train_accuracy"]
    if args.do_predict:
        report |= trainer.score(splits.test, "test")
    trainer.save_metrics("all", report, combined=False)
    if trainer.is_world_process_zero():
        for name in ("test_accuracy", "selected_test_accuracy", "best_test_accuracy"):
            if name in report:
                print(f"{name}: {report[name]:.4f}")
    return report


if __name__ == "__main__":
    main()
