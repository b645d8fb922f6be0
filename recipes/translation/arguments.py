"""Options of the translation recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import Seq2SeqTrainingArguments

from common.arguments import OptimizerArguments, TextTrainingArguments, at_least_one, option, parse
from common.outliers import OutlierArguments


@dataclass
class DataArguments(OutlierArguments):
    """What to translate, and how much of it."""

    dataset_name: str | None = option(
        None, "Hub id or local folder with train, validation and test splits. Default: the embedded corpus."
    )
    dataset_config_name: str | None = option(None, "Configuration of the dataset, where it has several.")
    source_lang: str = option("en", "Language to translate from: a column, or a key of the column 'translation'.")
    target_lang: str = option("de", "Language to translate into: a column, or a key of the column 'translation'.")
    max_train_samples: int | None = option(None, "Use only the first so many training pairs.")
    max_eval_samples: int | None = option(None, "Use only the first so many validation pairs.")
    max_predict_samples: int | None = option(None, "Use only the first so many test pairs.")
    max_source_length: int = option(128, "Longer sources are cut to so many tokens.")
    max_target_length: int = option(128, "Longer targets are cut, and generation stops, at so many tokens.")
    num_beams: int = option(1, "Beams of the generation; 1 is greedy.")
    misaligned: float = option(0.0, "Share of the training pairs whose targets are permuted among themselves.")
    random_targets: float = option(0.0, "Share of the training pairs, others, whose targets become random tokens.")
    noise_seed: int | None = option(None, "Seed of the two shares' pairs and targets. Default: --seed.")
    preprocessing_num_workers: int | None = option(None, "Processes that tokenize the dataset.")
    overwrite_output_dir: bool = option(
        False, "Start anew: delete the checkpoints in output_dir instead of resuming from the last one."
    )

    def __post_init__(self) -> None:
        """Reject values that no run can use."""
        super().__post_init__()
        if self.source_lang == self.target_lang:
            raise ValueError(f"source_lang and target_lang are both {self.source_lang!r}; name two languages.")
        if self.misaligned < 0 or self.random_targets < 0 or self.misaligned + self.random_targets > 1:
            raise ValueError(
                f"misaligned={self.misaligned:g} and random_targets={self.random_targets:g} must be shares of the "
                "training pairs, between 0 and 1, also together."
            )
        for name in ("max_source_length", "max_target_length", "num_beams"):
            at_least_one(self, name)
        for name in (
            "max_train_samples",
            "max_eval_samples",
            "max_predict_samples",
            "preprocessing_num_workers",
        ):
            if getattr(self, name) is not None:
                at_least_one(self, name)


@dataclass
class ModelArguments:
    """Size of the Transformer; the defaults are the base model of Vaswani et al. (2017)."""

    d_model: int = option(512, "Width of embeddings and hidden states.")
    encoder_layers: int = option(6, "Encoder layers.")
    decoder_layers: int = option(6, "Decoder layers.")
    ffn_dim: int = option(2048, "Inner width of the feed-forward layers.")
    num_heads: int = option(8, "Attention heads; they divide d_model.")
    dropout: float = option(0.1, "Dropout on embeddings and on each sublayer's output.")
    vocab_size: int = option(8000, "Size of the vocabulary shared by both languages, an upper bound.")

    def __post_init__(self) -> None:
        """Reject sizes that do not fit together."""
        for name in ("d_model", "encoder_layers", "decoder_layers", "ffn_dim", "num_heads"):
            at_least_one(self, name)
        if self.d_model % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide d_model={self.d_model}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must lie in [0, 1).")


@dataclass
class TranslationTrainingArguments(TextTrainingArguments, Seq2SeqTrainingArguments):
    """Seq2SeqTrainingArguments with the defaults of a translation model that is trained from scratch."""

    output_dir: str = option("outputs/translation", "Folder of the model, its card, plots and results.")
    do_eval: bool = option(True, "Translate and score the validation split at the end.")
    do_predict: bool = option(True, "Translate and score the test split at the end.")
    label_smoothing_factor: float = option(0.1, "Label smoothing, as in Vaswani et al. (2017).")

    def __post_init__(self) -> None:
        """Reject what this recipe has another option for; the rest is checked by the Trainer."""
        super().__post_init__()
        for name, ours in (("generation_num_beams", "num_beams"), ("generation_max_length", "max_target_length")):
            if getattr(self, name) is not None:
                raise ValueError(f"Set --{ours} instead of --{name}: it is saved with the model.")


DATACLASSES = (DataArguments, ModelArguments, OptimizerArguments, TranslationTrainingArguments)


def parse_arguments(
    argv: Sequence[str] | None = None,
) -> tuple[DataArguments, ModelArguments, OptimizerArguments, TranslationTrainingArguments]:
    """Parse the command line; see `common.arguments.parse`."""
    data, model, optimizer, training = parse(DATACLASSES, argv)
    return data, model, optimizer, training
