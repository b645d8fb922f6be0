"""A BERT to train from scratch, for the recipes that have no model to go on from."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from transformers import BertConfig, PreTrainedTokenizerBase

from common.arguments import at_least_one, check_model_size, option


@dataclass
class BertArguments:
    """The size of a BERT."""

    hidden_size: int = option(128, "New model: width of embeddings and hidden states; feed-forward layers have four.")
    num_hidden_layers: int = option(2, "New model: layers.")
    num_attention_heads: int = option(4, "New model: attention heads; they divide hidden_size.")
    dropout: float = option(0.1, "New model: dropout on embeddings, attention weights and each sublayer's output.")
    vocab_size: int = option(1000, "New model: size of the vocabulary, an upper bound.")

    def check(self, named: str | None) -> None:
        """Reject sizes that do not fit together, or that nobody would heed beside a model that is named."""
        sizes = fields(BertArguments)
        defaults = {f.name: f.default for f in fields(self)}
        given = [f.name for f in sizes if getattr(self, f.name) != defaults[f.name]]
        if named is not None and given:
            raise ValueError(f"{', '.join(given)}: options of a new model; leave them out with --model_name_or_path.")
        at_least_one(self, "hidden_size", "num_hidden_layers", "num_attention_heads")
        check_model_size(self, "num_attention_heads", "hidden_size")

    def config(self, tokenizer: PreTrainedTokenizerBase, max_length: int, **others: Any) -> BertConfig:
        """Return the configuration for texts of so many tokens; `others` are further entries of it."""
        return BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=4 * self.hidden_size,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
            max_position_embeddings=max_length,
            type_vocab_size=1,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **others,
        )
