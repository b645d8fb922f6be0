"""Train a Transformer to translate, from scratch, and score it.

Run it under accelerate, on one device or several:

    accelerate launch recipes/translate.py --config recipes/configs/quickstart.yaml
    accelerate launch recipes/translate.py --config recipes/configs/multi30k_small.yaml --optimizer adamw

The output folder holds the model and its tokenizer, README.md, all_results.json, predictions.txt and
learning_curve.png. A run that was interrupted resumes from its last checkpoint when it is started again.
With `--metric_for_best_model loss` (or bleu, and `--predict_with_generate true`) and `--save_total_limit 2` the test
split is also scored with the weights of the best epoch, as best_predict_bleu.

The logged losses contain label smoothing, and the training loss also dropout. train_nll, eval_nll and predict_nll,
measured at the end, contain neither: each is the mean negative log-likelihood of a target token, train_nll's in as many
pairs from the start of the training split as the validation split has.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from datasets import DatasetDict
from transformers import DataCollatorForSeq2Seq

from common.arguments import parse
from common.data import shown
from common.loss import make_loss
from common.run import prepare
from text.data import encode, longest_first
from text.run import train_and_score
from text.tokenizer import load_or_train
from translation.arguments import DATACLASSES
from translation.data import TARGET, load_pairs, tokenize, training_texts
from translation.model import build_model
from translation.trainer import ROW, TranslationTrainer, make_bleu


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, evaluate, write the output folder, and return what all_results.json holds."""
    parsed = parse(DATACLASSES, argv, output_dir="outputs/translation")
    data_args, model_args, _, args = parsed
    if data_args.test_sets and not args.do_predict:
        raise ValueError("test_sets are scored where --do_predict is on; leave out one of the two.")
    run = prepare(parsed)
    with args.main_process_first(desc="loading the dataset"):  # the other processes find the download
        pairs = load_pairs(data_args)
    tokenizer = load_or_train(run.checkpoint, training_texts(pairs["train"]), model_args.vocab_size)
    numbered = DatasetDict({name: rows.add_column(ROW, range(len(rows))) for name, rows in pairs.items()})
    splits = encode(numbered, partial(tokenize, tokenizer, data_args), data_args.preprocessing_num_workers)
    run.seed()
    model = build_model(tokenizer, model_args, data_args)
    facts = {"recipe": "translate.py", "task": "translation", "dataset_name": shown(data_args.dataset_name)}
    facts["distortion"] = data_args.distortion
    facts |= {name: getattr(data_args, name) for name in ("source_lang", "target_lang", "num_beams", "outliers")}
    references = list(longest_first(splits["validation"])[TARGET])
    return train_and_score(
        run,
        model,
        tokenizer,
        splits,
        facts,
        trainer_cls=TranslationTrainer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model, pad_to_multiple_of=data_args.pad_to_multiple_of),
        compute_loss_func=make_loss(args.label_smoothing_factor, data_args),
        compute_metrics=make_bleu(tokenizer, references) if args.predict_with_generate else None,
    )


if __name__ == "__main__":
    main()
