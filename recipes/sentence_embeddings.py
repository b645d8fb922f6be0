"""Train sentence embeddings in which a sentence and its translation are neighbours, with sentence-transformers.

    accelerate launch recipes/sentence_embeddings.py --output_dir outputs/sentence_embeddings
    accelerate launch recipes/sentence_embeddings.py --dataset_name bentrevett/multi30k --num_train_epochs 3
    accelerate launch recipes/sentence_embeddings.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2
        --dataset_name bentrevett/multi30k --learning_rate 1e-4 --per_device_train_batch_size 256 --mini_batch_size 32

The loss tells each sentence's translation from those of the rest of the batch (`MultipleNegativesRankingLoss`). With
`--mini_batch_size` it is computed in parts (`CachedMultipleNegativesRankingLoss`), in the memory of so many sentences.
Either way a step has several forward passes: one for each language, and each part.

The output folder holds the model as sentence-transformers loads it, README.md, all_results.json and learning_curve.png.
A run that was interrupted resumes from its last checkpoint when it is started again. The accuracy is that of finding
the translation of a sentence among those of all others of the split, the mean of both directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from safetensors.torch import save_file
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import TranslationEvaluator
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch.utils.data import DataLoader
from transformers import BertModel

from common.arguments import (
    OptimizerArguments,
    RecipeTrainingArguments,
    at_least_one,
    option,
    parse,
)
from common.data import shown
from common.optimizers import what_trained
from common.run import prepare
from common.trainer import RecipeTrainer
from text.bert import BertArguments
from text.card import render_card
from text.run import finish
from text.tokenizer import load_or_train
from translation.arguments import PairArguments
from translation.data import SOURCE, TARGET, load_pairs, training_texts


@dataclass
class DataArguments(PairArguments):
    """Which pairs, and how the loss takes them."""

    max_length: int = option(64, "Longer sentences are cut to so many tokens.")
    scale: float = option(20.0, "Factor of the cosine similarities in the loss, one over its temperature.")
    mini_batch_size: int | None = option(
        None, "Compute the loss in parts of so many sentences. Default: in one, which needs the memory of all."
    )

    def __post_init__(self) -> None:
        """Reject values that no run can use."""
        super().__post_init__()
        at_least_one(self, "max_length", "mini_batch_size")
        if not self.scale > 0:
            raise ValueError(f"scale is {self.scale}; it must be > 0.")


@dataclass
class ModelArguments(BertArguments):
    """A model to go on from, or the size of a BERT to train from scratch."""

    vocab_size: int = option(4000, "New model: size of the vocabulary, an upper bound.")
    model_name_or_path: str | None = option(
        None, "Hub id or local folder of a sentence-transformers model. Default: a new BERT of the sizes above."
    )

    def __post_init__(self) -> None:
        """Reject sizes that do not fit together, or that nobody would heed."""
        self.check(self.model_name_or_path)


@dataclass
class EmbeddingTrainingArguments(RecipeTrainingArguments, SentenceTransformerTrainingArguments):
    """SentenceTransformerTrainingArguments with the defaults of this recipe."""

    do_eval: bool = option(True, "Score the validation split at the end.")
    do_predict: bool = option(True, "Score the test split at the end.")
    per_device_train_batch_size: int = option(64, "Pairs in a training batch, on each device.")
    per_device_eval_batch_size: int = option(128, "Pairs in an evaluation batch, on each device.")
    save_strategy: str = option("epoch", "When to write a checkpoint.")
    warmup_steps: float = option(0.1, "Steps, or a part of all steps, over which the learning rate rises.")

    def __post_init__(self) -> None:
        """Reject what this recipe has no use for; the rest as `RecipeTrainingArguments`."""
        super().__post_init__()
        if self.label_smoothing_factor:
            raise ValueError("The losses of this recipe have no label smoothing: leave out --label_smoothing_factor.")
        if self.data_seed is not None:
            raise ValueError("This recipe draws its batches with --seed: leave out --data_seed.")
        if self.train_sampling_strategy != "random":
            raise ValueError("This recipe draws its batches at random: leave out --train_sampling_strategy.")


class Retrieval(TranslationEvaluator):
    """The accuracy of finding translations among those of all other sentences; the mean of both directions."""

    def __init__(self, pairs: Dataset, batch_size: int) -> None:
        super().__init__(list(pairs[SOURCE]), list(pairs[TARGET]), batch_size=batch_size, write_csv=False)
        self.primary_metric = "accuracy"

    def __call__(self, model: SentenceTransformer, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the accuracy."""
        return {"accuracy": super().__call__(model, *args, **kwargs)["mean_accuracy"]}


class EmbeddingTrainer(RecipeTrainer, SentenceTransformerTrainer):
    """The library's own Trainer, timed, and with the recipe's card."""

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """Drop the last pairs of an epoch in training alone: the library's own drops them in an evaluation too."""
        asked, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = asked

    def score(self, pairs: Dataset, prefix: str) -> dict[str, float]:
        """Return the loss and the accuracy of pairs, with the prefix and an underscore before each name."""
        self.evaluator = Retrieval(pairs, self.args.per_device_eval_batch_size)
        found: dict[str, float] = self.evaluate(pairs, metric_key_prefix=prefix)
        return found


def build_model(texts: Sequence[str], arguments: ModelArguments, max_length: int, named: str | None) -> Any:
    """Load the model that was named, or build a small BERT with mean pooling, from torch's generator.

    Args:
        texts: What a new tokenizer is trained on.
        arguments: Sizes of a new model.
        max_length: Longer sentences are cut to so many tokens.
        named: A Hub id or a folder; None for a new model.
    """
    if named is not None:
        model = SentenceTransformer(named)
        model.max_seq_length = min(max_length, model.max_seq_length or max_length)
        return model
    tokenizer = load_or_train(None, texts, arguments.vocab_size)
    tokenizer.model_max_length = max_length
    bert = BertModel(arguments.config(tokenizer, max_length))
    with TemporaryDirectory() as folder:  # from which alone the library makes its module, in each process by itself
        bert.config.save_pretrained(folder)
        save_file(bert.state_dict(), Path(folder, "model.safetensors"), {"format": "pt"})
        tokenizer.save_pretrained(folder)
        encoder = Transformer(folder, max_seq_length=max_length)
    return SentenceTransformer(modules=[encoder, Pooling(arguments.hidden_size)])


DATACLASSES = (DataArguments, ModelArguments, OptimizerArguments, EmbeddingTrainingArguments)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, evaluate, write the output folder, and return what all_results.json holds."""
    parsed = parse(DATACLASSES, argv, output_dir="outputs/sentence_embeddings")
    data_args, model_args, _, args = parsed
    run = prepare(parsed)
    with args.main_process_first(desc="loading the dataset"):  # the other processes find the download
        pairs = load_pairs(data_args)
    run.seed()
    named = run.checkpoint or model_args.model_name_or_path
    model = build_model(list(training_texts(pairs["train"])), model_args, data_args.max_length, named)
    loss = (
        MultipleNegativesRankingLoss(model, scale=data_args.scale)
        if data_args.mini_batch_size is None
        else CachedMultipleNegativesRankingLoss(model, scale=data_args.scale, mini_batch_size=data_args.mini_batch_size)
    )
    report: dict[str, Any] = {
        "recipe": "sentence_embeddings.py",
        "task": "sentence-similarity",
        "library": "sentence-transformers",
        "dataset_name": shown(data_args.dataset_name),
        "source_lang": data_args.source_lang,
        "target_lang": data_args.target_lang,
        "model": type(getattr(model[0], "model", model[0])).__name__,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "train_samples": len(pairs["train"]),
        "test_sets": [name for name in pairs if name not in ("train", "validation", "test")],
        "seed": args.seed,
    }
    if model_args.model_name_or_path is not None:
        start = shown(model_args.model_name_or_path)
        report |= {"model_name_or_path": start, "trained": "all weights were trained"}
    trainer = EmbeddingTrainer(
        render_card=lambda: render_card(report | what_trained(trainer.optimizer), args),
        model=model,
        args=args,
        train_dataset=pairs["train"],
        eval_dataset=pairs["validation"],
        loss=loss,
        evaluator=Retrieval(pairs["validation"], args.per_device_eval_batch_size),
        optimizer_cls_and_kwargs=run.optimizer,
        callbacks=run.callbacks,
    )
    report |= run.train(trainer)
    if args.do_eval:
        report |= trainer.score(pairs["validation"], "eval")
    if args.do_predict:
        report |= trainer.score(pairs["test"], "predict")
        for name in report["test_sets"]:
            report |= trainer.score(pairs[name], f"predict_{name}")
    finish(trainer, report)
    return report


if __name__ == "__main__":
    main()
