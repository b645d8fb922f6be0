"""Untrained models of any size, and their batches."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
)

from images.arguments import ModelArguments
from images.models import build_model

CLASSES = 10


def marian(options: argparse.Namespace) -> MarianMTModel:
    """The Transformer of Vaswani et al. (2017)."""
    return MarianMTModel(
        MarianConfig(
            vocab_size=options.vocab_size,
            d_model=options.d_model,
            encoder_layers=options.layers,
            decoder_layers=options.layers,
            encoder_ffn_dim=options.ffn_dim,
            decoder_ffn_dim=options.ffn_dim,
            encoder_attention_heads=options.heads,
            decoder_attention_heads=options.heads,
            max_position_embeddings=max(1024, options.length),
            activation_function="relu",
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )


def gpt2(options: argparse.Namespace) -> GPT2LMHeadModel:
    """GPT-2 (Radford et al. 2019), whose layers are Conv1D."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=options.vocab_size,
            n_embd=options.d_model,
            n_layer=options.layers,
            n_head=options.heads,
            n_inner=options.ffn_dim,
            n_positions=max(1024, options.length),
            bos_token_id=1,
            eos_token_id=1,
        )
    )


def bert(options: argparse.Namespace) -> BertForMaskedLM:
    """BERT (Devlin et al. 2019)."""
    return BertForMaskedLM(BertConfig(**sizes(options)))


def bert_classifier(options: argparse.Namespace) -> BertForSequenceClassification:
    """BERT below a classifier of whole rows, as it is fine-tuned."""
    return BertForSequenceClassification(BertConfig(**sizes(options), num_labels=CLASSES))


def llama(options: argparse.Namespace) -> LlamaForCausalLM:
    """Llama (Touvron et al. 2023): RMS norms, gated feed-forward layers, an untied head."""
    return LlamaForCausalLM(LlamaConfig(**sizes(options), pad_token_id=0))


def sizes(options: argparse.Namespace) -> dict[str, int]:
    """What most configurations call their sizes."""
    return {
        "vocab_size": options.vocab_size,
        "hidden_size": options.d_model,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "intermediate_size": options.ffn_dim,
        "max_position_embeddings": max(512, options.length),
    }


def image_classifier(options: argparse.Namespace, **arguments: Any) -> PreTrainedModel:
    """One of `recipes/image_classification.py`, for images of `--length` pixels a side."""
    return build_model(ModelArguments(**arguments), options.length, CLASSES)


MODELS: dict[str, Callable[[argparse.Namespace], PreTrainedModel]] = {
    "marian": marian,
    "gpt2": gpt2,
    "bert": bert,
    "bert_classifier": bert_classifier,
    "llama": llama,
}
COUNTED = {"marian", "gpt2", "bert", "llama"}  # by the cost model: each of their layers sees every position
# Of a size of their own.
IMAGE_MODELS: dict[str, Callable[[argparse.Namespace], PreTrainedModel]] = {
    "resnet32": partial(image_classifier, model="resnet", num_layers=32),
    "vgg11": partial(image_classifier, model="vgg"),
}


def build(options: argparse.Namespace) -> nn.Module:
    """The model, in LoRA adapters where `--lora_r` says so: of `--lora_r` on every Linear but the output layers."""
    model = (MODELS | IMAGE_MODELS)[options.model](options)
    if options.lora_r is None:
        return model
    kind = "SEQ_CLS" if options.model == "bert_classifier" else None  # whose output layer is trained too
    config = LoraConfig(r=options.lora_r, lora_alpha=2 * options.lora_r, target_modules="all-linear", task_type=kind)
    return get_peft_model(model, config)


def attentions(options: argparse.Namespace) -> int:
    """How many attentions a model has: marian's decoder layers have two each."""
    return int(options.layers) * (3 if options.model == "marian" else 1)


def batch(options: argparse.Namespace) -> dict[str, Tensor]:
    """Random tokens ``[batch_size, length]``, or images."""
    if options.model in IMAGE_MODELS:
        return {
            "pixel_values": torch.randn(options.batch_size, 3, options.length, options.length, device=options.device),
            "labels": torch.randint(CLASSES, (options.batch_size,), device=options.device),
        }
    shape = (options.batch_size, options.length)
    tokens = {
        name: torch.randint(2, options.vocab_size, shape, device=options.device) for name in ("input_ids", "labels")
    }
    if options.model == "bert_classifier":
        tokens["labels"] = torch.randint(CLASSES, shape[:1], device=options.device)
    return tokens
