"""A byte-level BPE tokenizer, trained on the texts of the training split."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, EOS = "<pad>", "</s>"
_SMALLEST = 256 + 2  # every byte, and the two special tokens


def load_or_train(
    named: str | None, texts: Iterable[str], vocab_size: int, template: str = f"$A {EOS}"
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint or of a model that was named, or else train one; see `train_tokenizer`.

    A tokenizer without a padding token, like GPT-2's, pads with its end of text.
    """
    if named is None:
        return train_tokenizer(texts, vocab_size, template)
    tokenizer = AutoTokenizer.from_pretrained(named)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, template: str = f"$A {EOS}") -> PreTrainedTokenizerFast:
    """Train one vocabulary for all texts; of several languages, which is what shared embeddings need.

    Bytes are the alphabet, so that no text is out of vocabulary, and decoding gives back any text that does not
    start with white space.

    Args:
        texts: Sentences.
        vocab_size: Upper bound of the vocabulary's size; a small corpus may not fill it.
        template: What a tokenized text `$A` gets in front and behind; by default it ends with `</s>`.

    Returns:
        A tokenizer that saves and loads as any other. It knows `</s>` as the start of a sequence too, as GPT-2's does,
        where the template has it in front.

    Raises:
        ValueError: vocab_size is too small for the alphabet.
    """
    if vocab_size < _SMALLEST:
        raise ValueError(f"vocab_size is {vocab_size}; 256 bytes and 2 special tokens need at least {_SMALLEST}.")
    tokenizer = Tokenizer(models.BPE())
    # With the prefix space a word has the same tokens at the start of a sentence as inside it.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(EOS, tokenizer.token_to_id(EOS))]
    )
    start = {"bos_token": EOS} if template.startswith(EOS) else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        **start,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
