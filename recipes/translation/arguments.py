"""Options of the translation recipe."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from transformers import Seq2SeqTrainingArguments

from common.arguments import (
    OptimizerArguments,
    TextTrainingArguments,
    at_least_one,
    check_model_size,
    option,
)
from common.loss import OutlierArguments
from text.arguments import RowArguments, TokenizedArguments

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""The files of pairs that `datasets` loads, by their endings."""


@dataclass
class PairArguments(RowArguments):
    """Pairs of texts in two languages."""

    source_lang: str = option("en", "Language to translate from: a column, or a key of the column 'translation'.")
    target_lang: str = option("de", "Language to translate into: a column, or a key of the column 'translation'.")
    test_sets: list[str] | None = option(  # noqa: RUF009, as it returns a field
        None, "More test sets: splits of the dataset, or files of pairs (.jsonl, .json, .csv, .parquet)."
    )

    def __post_init__(self) -> None:
        """Reject languages that are one, and test sets of one name."""
        super().__post_init__()
        if self.source_lang == self.target_lang:
            raise ValueError(f"source_lang and target_lang are both {self.source_lang!r}; name two languages.")
        names = [name_of_test_set(test_set) for test_set in self.test_sets or ()]
        if len({*names, "train", "validation", "test"}) < len(names) + 3:
            raise ValueError(
                f"test_sets are reported by the names {', '.join(names)}, which must differ from each other and from "
                "train, validation and test: rename a file, or leave a split out."
            )


@dataclass
class DataArguments(OutlierArguments, PairArguments, TokenizedArguments):
    """What to translate, and how much of it."""

    max_source_length: int = option(128, "Longer sources are cut to so many tokens.")
    max_target_length: int = option(128, "Longer targets are cut, and generation stops, at so many tokens.")
    num_beams: int = option(1, "Beams of the generation; 1 is greedy.")
    pad_to_multiple_of: int | None = option(
        None, "Pad batches to lengths that this divides: a compiled model has few shapes then."
    )

    def __post_init__(self) -> None:
        """Reject values that no run can use."""
        OutlierArguments.__post_init__(self)
        PairArguments.__post_init__(self)
        at_least_one(self, "max_source_length", "max_target_length", "num_beams", "pad_to_multiple_of")
        for name in ("max_source_length", "max_target_length"):
            longest = getattr(self, name)
            if longest % (self.pad_to_multiple_of or 1):  # the model has no positions beyond the longest
                raise ValueError(f"pad_to_multiple_of={self.pad_to_multiple_of} must divide {name}={longest}.")


def name_of_test_set(test_set: str) -> str:
    """Return what a split or file of `test_sets` is called in the report: letters, digits, underscores."""
    path = Path(test_set)
    return re.sub(r"\W+", "_", path.stem if path.suffix in FORMATS else test_set)


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
    tie_word_embeddings: bool = option(True, "Whether both embeddings and the output layer share one matrix.")

    def __post_init__(self) -> None:
        """Reject sizes that do not fit together."""
        at_least_one(self, "d_model", "encoder_layers", "decoder_layers", "ffn_dim", "num_heads")
        check_model_size(self, "num_heads", "d_model")


@dataclass
class TranslationTrainingArguments(TextTrainingArguments, Seq2SeqTrainingArguments):
    """Seq2SeqTrainingArguments with the defaults of a translation model that is trained from scratch."""

    label_smoothing_factor: float = option(0.1, "Label smoothing, as in Vaswani et al. (2017).")

    def __post_init__(self) -> None:
        """Reject what this recipe has another option for; the rest is checked by the Trainer."""
        super().__post_init__()
        for name, ours in (("generation_num_beams", "num_beams"), ("generation_max_length", "max_target_length")):
            if getattr(self, name) is not None:
                raise ValueError(f"Set --{ours} instead of --{name}: it is saved with the model.")


DATACLASSES = (DataArguments, ModelArguments, OptimizerArguments, TranslationTrainingArguments)
