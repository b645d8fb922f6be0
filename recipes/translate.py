"""Train a Transformer to translate, from scratch, and score it.

Run it under accelerate, on one device or several:

    accelerate launch recipes/translate.py --config recipes/configs/quickstart.yaml
    accelerate launch recipes/translate.py --config recipes/configs/multi30k_small.yaml --optimizer adamw

The output folder holds the model and its tokenizer, README.md, all_results.json, predictions.txt and
learning_curve.png. A run that was interrupted resumes from its last checkpoint when it is started again.
With `--metric_for_best_model loss` (or bleu, and `--predict_with_generate true`) and `--save_total_limit 2` the test
split is also scored with the weights of the best epoch, as best_predict_bleu.

The losses that Trainer logs have label smoothing in them, and the training loss dropout. At the end train_nll and
eval_nll are measured without either: the mean negative log-likelihood of a target token, in the validation split and
in as many pairs from the start of the training split. `--misaligned 0.3` gives a share of the training pairs wrong
targets (`--random_targets 0.01`: random ones); then train_nll_wrong and train_nll_right tell the two kinds apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, enable_full_determinism, set_seed

from common.checkpoints import find_checkpoint
from common.optimizers import callbacks, describe, fngd_config, optimizer_cls_and_kwargs
from common.tokenizer import train_tokenizer
from common.trainer import make_loss
from hf_fngd import add_index
from translation.arguments import parse_arguments
from translation.card import render_card
from translation.data import encode, hold_out, load_pairs, make_collator, training_texts
from translation.model import build_model
from translation.noise import add_noise
from translation.plot import plot_learning_curve
from translation.trainer import TranslationTrainer, make_bleu, mean_nll


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, evaluate, and write the output folder.

    Args:
        argv: The command line behind the program's name; `sys.argv[1:]` where None.

    Returns:
        What all_results.json holds.
    """
    data_args, model_args, optimizer_args, args = parse_arguments(argv)
    config = fngd_config(optimizer_args, args)
    optimizer = optimizer_cls_and_kwargs(optimizer_args, config, args)
    checkpoint = find_checkpoint(args, data_args.overwrite_output_dir)
    if checkpoint is not None and args.process_index == 0:
        print(f"Resuming from {checkpoint}; --overwrite_output_dir starts anew.")

    with args.main_process_first(desc="loading the dataset"):  # the other processes find the download
        pairs = load_pairs(data_args)
    if checkpoint is None:
        tokenizer = train_tokenizer(training_texts(pairs["train"]), model_args.vocab_size)
    else:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    train = encode(pairs["train"], tokenizer, data_args, "Tokenizing train")
    train, noise = add_noise(train, tokenizer, data_args, args.seed)
    validation = hold_out(pairs["validation"], tokenizer, data_args, "Tokenizing validation")
    test = hold_out(pairs["test"], tokenizer, data_args, "Tokenizing test")
    first = train.select(range(min(len(train), len(validation.order))))
    if config is not None and config.sharing == "index":
        train = add_index(train)

    enable_full_determinism(args.seed) if args.full_determinism else set_seed(args.seed)
    model = build_model(tokenizer, model_args, data_args)
    report: dict[str, Any] = {
        "dataset_name": data_args.dataset_name,
        "source_lang": data_args.source_lang,
        "target_lang": data_args.target_lang,
        "num_beams": data_args.num_beams,
        "parameters": model.num_parameters(only_trainable=True),
        "train_samples": len(train),
        "outliers": data_args.outliers,
        "seed": args.seed,
    } | noise.report()
    trainer = TranslationTrainer(
        optimizer_cls_and_kwargs=optimizer,
        render_card=lambda: render_card(report | describe(trainer.optimizer, config), args),
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation.encoded,
        data_collator=make_collator(tokenizer, model),
        processing_class=tokenizer,
        compute_loss_func=make_loss(args.label_smoothing_factor, data_args),
        compute_metrics=make_bleu(tokenizer, len(validation.order)) if args.predict_with_generate else None,
        callbacks=callbacks(optimizer_args),
    )
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if checkpoint is None:
        report |= metrics  # after resuming, Trainer divides the rest's loss and time by the steps of the whole run
    report |= describe(trainer.optimizer, config) | trainer.timer.report()
    trainer.save_model()
    trainer.save_state()

    output_dir = Path(args.output_dir)
    if args.do_eval:
        report |= trainer.translate(validation, "eval")[1]
        report["eval_nll"] = mean_nll(trainer.log_likelihoods(validation.encoded))
        scores = trainer.log_likelihoods(first)
        report["train_nll"] = mean_nll(scores)
        if noise.rows:
            wrong = torch.zeros(len(train), dtype=torch.bool)
            wrong[noise.rows] = True
            wrong = wrong[: len(first)]
            report |= {"train_nll_wrong": mean_nll(scores[wrong]), "train_nll_right": mean_nll(scores[~wrong])}
    if args.do_predict:
        translations, metrics = trainer.translate(test, "predict")
        report |= metrics
        if trainer.is_world_process_zero():
            (output_dir / "predictions.txt").write_text("\n".join(translations) + "\n", encoding="utf-8")
        best = trainer.state.best_model_checkpoint
        if best is not None and not args.load_best_model_at_end:
            report |= trainer.translate_as_of(best, test, "best_predict")[1]
    trainer.save_metrics("all", report, combined=False)
    trainer.create_model_card()
    if trainer.is_world_process_zero():
        title = f"{report['optimizer']}, {data_args.source_lang} to {data_args.target_lang}"
        plot_learning_curve(trainer.state.log_history, output_dir / "learning_curve.png", title)
        for split in ("eval", "predict"):
            if f"{split}_bleu" in report:
                print(f"{split}: BLEU {report[f'{split}_bleu']:.2f} ({report[f'{split}_bleu_signature']})")
    if args.push_to_hub:
        trainer.push_to_hub()
    return report


if __name__ == "__main__":
    main()
