"""The conventional encoder-decoder Transformer, randomly initialized."""

from __future__ import annotations

import torch
from torch import nn
from transformers import GenerationConfig, MarianConfig, MarianMTModel, PreTrainedTokenizerBase

from translation.arguments import DataArguments, ModelArguments


def build_model(
    tokenizer: PreTrainedTokenizerBase, model_args: ModelArguments, data_args: DataArguments
) -> MarianMTModel:
    """Build the Transformer of Vaswani et al. (2017) as a MarianMTModel.

    Marian is that architecture: layer norm behind each residual sum, fixed sinusoidal positions, ReLU, one
    matrix for both embeddings and the output layer (three, where they are not tied), embeddings scaled by
    sqrt(d_model). The longest sequences and the number of beams go into the generation configuration.
    """
    tokens = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "forced_eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    config = MarianConfig(
        vocab_size=len(tokenizer),
        share_encoder_decoder_embeddings=model_args.tie_word_embeddings,
        tie_word_embeddings=model_args.tie_word_embeddings,
        d_model=model_args.d_model,
        encoder_layers=model_args.encoder_layers,
        decoder_layers=model_args.decoder_layers,
        encoder_ffn_dim=model_args.ffn_dim,
        decoder_ffn_dim=model_args.ffn_dim,
        encoder_attention_heads=model_args.num_heads,
        decoder_attention_heads=model_args.num_heads,
        dropout=model_args.dropout,
        activation_function="relu",
        scale_embedding=True,
        init_std=model_args.d_model**-0.5,
        max_position_embeddings=max(data_args.max_source_length, data_args.max_target_length),
        **tokens,
    )
    model = MarianMTModel(config)
    _initialize(model)
    longest = data_args.max_target_length
    model.generation_config = GenerationConfig(max_length=longest, num_beams=data_args.num_beams, **tokens)
    return model


@torch.no_grad()
def _initialize(model: MarianMTModel) -> None:
    """Initialize for training from scratch: Glorot's uniform matrices, embeddings of variance 1 / d_model.

    Marian's own initialization gives every matrix the deviation of the embedding, whatever its shape. The
    embedding's makes inputs of unit size, after the scaling, and logits of unit size, through the tied output.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not (name == "lm_head" and model.config.tie_word_embeddings):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    embeddings = (stack.embed_tokens.weight for stack in (model.get_encoder(), model.get_decoder()))
    for weight in dict.fromkeys(embeddings):  # one or two
        nn.init.normal_(weight, std=model.config.d_model**-0.5)
        weight[model.config.pad_token_id].zero_()
