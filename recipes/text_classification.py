"""Fine-tune a classifier of texts, or train a small one from scratch, and measure its accuracy.

    accelerate launch recipes/text_classification.py --output_dir outputs/text_classification
    accelerate launch recipes/text_classification.py --model_name_or_path google-bert/bert-base-uncased
        --dataset_name fancyzhx/ag_news --train_split 'train[:95%]' --validation_split 'train[95%:]'
    accelerate launch recipes/text_classification.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2
        --dataset_name PolyAI/banking77 --validation_shots 10 --shots 5 --lora_r 8 --forgetting_dataset subjects

The output folder holds the model and its tokenizer, README.md, all_results.json and learning_curve.png. A run that was
interrupted resumes from its last checkpoint when it is started again. With `--metric_for_best_model accuracy` and
`--save_total_limit 2` the test split is also scored with the weights of the best epoch, as best_predict_accuracy.

A pretrained model is fine-tuned whole, by LoRA adapters (`--lora_r`), or in its output layers (`--freeze_encoder`).
`--shots` draws a few examples of each class; `--forgetting_dataset` measures what becomes of another task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict
from peft import PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from classification import subjects
from classification.bad_samples import BadSampleArguments, spoiled
from classification.calibration import accuracy_and_calibration
from classification.callbacks import EarlyStopping, SkipSpikes
from classification.fine_tuning import FineTuningArguments, with_own_rates
from classification.forgetting import EMBEDDED, Forgetting, ForgettingArguments
from common.arguments import OptimizerArguments, TextTrainingArguments, at_least_one, option, parse
from common.data import shown
from common.loss import OutlierArguments, make_loss
from common.run import prepare
from text.arguments import TextArguments
from text.bert import BertArguments
from text.data import APART, TEXT, draw_shots, encode, load_splits
from text.run import train_and_score
from text.tokenizer import EOS, load_or_train

LABEL, LABELS = "label", "labels"  # of the dataset, and of the model


@dataclass
class DataArguments(OutlierArguments, BadSampleArguments, TextArguments):
    """Which texts with which labels, and how many of them."""

    label_column: str = option("label", "Column of the labels: class labels, whole numbers or strings.")
    max_length: int = option(128, "Longer texts are cut to so many tokens.")
    shots: int | None = option(None, "Train on so many rows of each class, drawn with the seed. Default: all rows.")
    validation_shots: int | None = option(
        None, "Validate on so many training rows of each class, the same ones for all seeds. Default: a split."
    )

    def __post_init__(self) -> None:
        """Reject values that no run can use."""
        for base in DataArguments.__bases__:
            base.__post_init__(self)
        at_least_one(self, "max_length", "shots", "validation_shots")
        if self.validation_shots is not None:
            if self.max_eval_samples is not None or self.validation_split != "validation":
                raise ValueError(
                    "--validation_shots draws training rows: leave out --validation_split and --max_eval_samples."
                )
            self.validation_split = self.train_split  # of which the rows are drawn apart

    @property
    def apart(self) -> tuple[str, ...]:
        """The splits that may have no row in common."""
        return super().apart if self.validation_shots is None else ("train", "test")


@dataclass
class ModelArguments(BertArguments, FineTuningArguments):
    """A model to fine-tune, or the size of a BERT to train from scratch."""

    def __post_init__(self) -> None:
        """Reject sizes that do not fit together, or that nobody would heed."""
        super().__post_init__()
        self.check(self.model_name_or_path)


@dataclass
class ClassificationTrainingArguments(TextTrainingArguments):
    """TrainingArguments, and when else to score or to stop."""

    early_stopping_patience: int | None = option(
        None, "Stop after so many evaluations without a better metric_for_best_model. Default: never."
    )
    predict_first_epoch: bool = option(False, "With do_predict: score the test split after one epoch as well.")
    skip_above: float | None = option(
        None, "Leave out steps whose gradient's norm is so many times the median of the last hundred steps'."
    )

    restore_callback_states_from_checkpoint: bool = option(
        True, "On: early stopping and --skip_above go on from what they had seen."
    )

    def __post_init__(self) -> None:
        """Reject what early stopping and --skip_above cannot go by."""
        super().__post_init__()
        at_least_one(self, "early_stopping_patience")
        if self.skip_above is not None and (self.skip_above <= 1 or self.max_grad_norm):
            raise ValueError(
                f"skip_above={self.skip_above} must be above 1, and needs --max_grad_norm 0: clipped gradients have no "
                "spikes."
            )
        if self.skip_above is not None and self.fp16:
            raise ValueError("--skip_above compares norms, which --fp16 scales: use --bf16, or none of the two.")
        if self.early_stopping_patience is not None and not self.load_best_model_at_end:
            raise ValueError("--early_stopping_patience needs --load_best_model_at_end and --metric_for_best_model.")


DATACLASSES = (
    DataArguments,
    ModelArguments,
    ForgettingArguments,
    OptimizerArguments,
    ClassificationTrainingArguments,
)


def number_labels(splits: DatasetDict) -> tuple[DatasetDict, list[str]]:
    """Replace the column `label` by numbers from 0 on, in the column `labels`.

    Returns:
        The splits, and the names of the labels: a ClassLabel's, else the values in the training split, sorted.

    Raises:
        ValueError: A label is missing, is a fraction, or does not occur in training.
    """
    feature = splits["train"].features[LABEL]
    names = list(feature.names) if isinstance(feature, ClassLabel) else None
    values = list(range(len(names))) if names else sorted(set(splits["train"][LABEL]) - {None})
    if any(not isinstance(value, int | str) for value in values):
        raise ValueError(
            f"Labels like {values[0]!r} are no classes; choose whole numbers or strings by --label_column."
        )
    if len(values) < 2:
        raise ValueError(
            "The training split has one class alone: nothing to tell apart. Shuffle it, or take more of it."
        )
    numbers = {value: number for number, value in enumerate(values)}
    numbered = {}
    for split, rows in splits.items():
        unknown = sorted({repr(value) for value in rows[LABEL] if value not in numbers})
        if unknown:
            raise ValueError(
                f"The {split} split has labels that training does not have: {', '.join(unknown[:5])}. Splits without "
                f"labels have None or -1; a part of another split serves as well. {APART.format(split)}"
            )
        columns = {TEXT: list(rows[TEXT]), LABELS: [numbers[value] for value in rows[LABEL]]}
        numbered[split] = Dataset.from_dict(columns)
    return DatasetDict(numbered), names or [str(value) for value in values]


def choose_rows(splits: DatasetDict, data_args: DataArguments, seed: int) -> DatasetDict:
    """Draw the rows to train and to validate on, where only some of each class are wanted."""
    train, chosen = splits["train"], DatasetDict(splits)
    if data_args.validation_shots is not None:
        drawn, rest = draw_shots(list(train[LABELS]), data_args.validation_shots, seed=0)
        chosen["validation"], train = train.select(drawn), train.select(rest)
    if data_args.shots is not None:
        train = train.select(draw_shots(list(train[LABELS]), data_args.shots, seed)[0])
    chosen["train"] = train
    return chosen


class OtherTask(DataArguments):
    """A task that nothing is trained on but a probe: its validation split, which nobody reads, is its test split."""

    @property
    def apart(self) -> tuple[str, ...]:
        """The splits that may have no row in common."""
        return ("train", "test")


def load_forgetting(args: ForgettingArguments) -> DatasetDict:
    """Load the texts of another task, with their numbered labels."""
    data = OtherTask(
        dataset_name=None if args.forgetting_dataset == EMBEDDED else args.forgetting_dataset,
        text_column=args.forgetting_text_column,
        label_column=args.forgetting_label_column,
        validation_split="test",
    )
    sizes = {"train_size": args.forgetting_samples, "test_size": args.forgetting_samples}
    return number_labels(load_splits(data, partial(subjects.load, validation_size=1, **sizes), (TEXT, LABEL)))[0]


def build_model(
    tokenizer: PreTrainedTokenizerBase, model_args: ModelArguments, max_length: int, labels: Sequence[str]
) -> tuple[PreTrainedModel | PeftModel, str]:
    """Load the model that was named, with a new output layer, or build a small BERT; both from torch's generator.

    Returns:
        The model, and what is trained of it in words.
    """
    names: dict[str, Any] = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
    }
    if model_args.model_name_or_path is not None:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            model_args.model_name_or_path,
            pad_token_id=tokenizer.pad_token_id,
            ignore_mismatched_sizes=True,  # an output layer for other labels
            output_loading_info=True,
            **names,
        )
        new = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
        return model_args.adapt(model, {name.rpartition(".")[0] for name in new})
    model = BertForSequenceClassification(model_args.config(tokenizer, max_length, **names))
    return model, "trained from scratch"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, evaluate, write the output folder, and return what all_results.json holds."""
    parsed = parse(DATACLASSES, argv, output_dir="outputs/text_classification")
    data_args, model_args, forgetting_args, optimizer_args, args = parsed
    if forgetting_args.forgetting_dataset is not None and (
        model_args.model_name_or_path is None or args.fsdp or args.deepspeed
    ):
        raise ValueError(
            "--forgetting_dataset measures a pretrained model, whole on one device: name one by --model_name_or_path, "
            "and leave out --fsdp and --deepspeed."
        )
    run = prepare(parsed)
    with args.main_process_first(desc="loading the dataset"):  # the other processes find the download
        texts, labels = number_labels(load_splits(data_args, subjects.load, (TEXT, LABEL)))
        others = None if forgetting_args.forgetting_dataset is None else load_forgetting(forgetting_args)
    texts = choose_rows(texts, data_args, args.seed_of_data)
    texts["train"] = spoiled(texts["train"], data_args, len(labels), args.seed_of_data)
    named = run.checkpoint or model_args.model_name_or_path
    # In a new tokenizer the first token stands for the whole text.
    tokenizer = load_or_train(named, texts["train"][TEXT], model_args.vocab_size, f"{EOS} $A")
    max_length = min(data_args.max_length, tokenizer.model_max_length)

    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        return dict(tokenizer(batch[TEXT], truncation=True, max_length=max_length))

    splits = encode(texts, tokenize, data_args.preprocessing_num_workers)
    run.seed()
    model, trained = build_model(tokenizer, model_args, max_length, labels)
    facts: dict[str, Any] = {
        "recipe": "text_classification.py",
        "task": "text-classification",
        "dataset_name": shown(data_args.dataset_name),
        "num_labels": len(labels),
        "trained": trained,
        "shots": data_args.shots,
        "distortion": "; ".join(filter(None, (data_args.spoiling, data_args.distortion))),
        "lora_r": model_args.lora_r,
    }
    if model_args.model_name_or_path is not None:
        facts["model_name_or_path"] = shown(model_args.model_name_or_path)
    if model_args.has_own_rates:
        run = with_own_rates(run, model, optimizer_args.optimizer, model_args)
    forgetting = None
    if others is not None:
        facts["forgetting_dataset"] = shown(forgetting_args.forgetting_dataset)
        samples = forgetting_args.forgetting_samples
        forgetting = Forgetting(model.to(args.device), tokenizer, others, samples, max_length)
    patience = args.early_stopping_patience
    return train_and_score(
        run,
        model,
        tokenizer,
        splits,
        facts,
        callbacks=[
            *([] if patience is None else [EarlyStopping(patience)]),
            *([] if args.skip_above is None else [SkipSpikes(args.skip_above)]),
        ],
        first_epoch=args.do_predict and args.predict_first_epoch,
        measure=None if forgetting is None else forgetting.measure,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_loss_func=make_loss(args.label_smoothing_factor, data_args),
        compute_metrics=accuracy_and_calibration,
    )


if __name__ == "__main__":
    main()
