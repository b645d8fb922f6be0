"""Families that write text: encoder-decoders, decoders and PEFT adapters."""

import warnings

import peft
import transformers as hf
from torch import nn

from hf_fngd.engine.coverage import NEVER_CALLED
from hf_fngd.engine.layer import CALLED_AGAIN
from hf_fngd.layers.base import NOT_THE_BATCH
from tests.architectures.registry import (
    EMBEDDING,
    HEADS,
    INNER,
    NORM,
    PAD,
    PRECONDITIONED,
    TIED,
    VOCABULARY,
    WIDTH,
    family,
    kind,
    language,
)

# Encoder-decoders. BART's descendants share its names; their heads are tied to the shared embedding. ------------

BART_LINEARS = """
    model.(en|de)coder.layers.*.(self_attn|encoder_attn).(q|k|v|out)_proj model.(en|de)coder.layers.*.fc(1|2)
"""
BART_NORMS = "model.(en|de)coder.layers.*.(self_attn|encoder_attn|final)_layer_norm"
BART_SIZES = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "max_position_embeddings": 32,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "pad_token_id": PAD,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": PAD,
    "forced_eos_token_id": None,
}


@family(
    "Marian",
    language,
    {
        PRECONDITIONED: BART_LINEARS,
        EMBEDDING: "model.shared model.(en|de)coder.embed_tokens",
        TIED: "lm_head",
        NORM: BART_NORMS,
    },
    remark="sinusoidal positions are not trained",
)
def marian() -> nn.Module:
    return hf.MarianMTModel(hf.MarianConfig(**BART_SIZES))


@family(
    "BART",
    language,
    {
        PRECONDITIONED: BART_LINEARS,
        kind("BartScaledWordEmbedding"): "model.shared model.(en|de)coder.embed_tokens",
        kind("BartLearnedPositionalEmbedding"): "model.(en|de)coder.embed_positions",
        TIED: "lm_head",
        NORM: f"{BART_NORMS} model.(en|de)coder.layernorm_embedding",
    },
)
def bart() -> nn.Module:
    return hf.BartForConditionalGeneration(hf.BartConfig(**BART_SIZES))


@family(
    "Pegasus",
    language,
    {
        PRECONDITIONED: BART_LINEARS,
        EMBEDDING: "model.shared model.(en|de)coder.embed_tokens",
        TIED: "lm_head",
        NORM: f"{BART_NORMS} model.(en|de)coder.layer_norm",
    },
    remark="sinusoidal positions are not trained",
)
def pegasus() -> nn.Module:
    return hf.PegasusForConditionalGeneration(hf.PegasusConfig(**BART_SIZES))


@family(
    "M2M100",
    language,
    {
        PRECONDITIONED: BART_LINEARS,
        kind("M2M100ScaledWordEmbedding"): "model.shared model.(en|de)coder.embed_tokens",
        TIED: "lm_head",
        NORM: f"{BART_NORMS} model.(en|de)coder.layer_norm",
    },
    remark="sinusoidal positions are a buffer",
)
def m2m100() -> nn.Module:
    return hf.M2M100ForConditionalGeneration(hf.M2M100Config(**BART_SIZES))


@family(
    "T5",
    language,
    {
        PRECONDITIONED: """
            (en|de)coder.block.*.layer.*.(SelfAttention|EncDecAttention).(q|k|v|o)
            (en|de)coder.block.*.layer.*.DenseReluDense.w(i|o)
        """,
        EMBEDDING: """
            shared (en|de)coder.embed_tokens (en|de)coder.block.0.layer.0.SelfAttention.relative_attention_bias
        """,
        TIED: "lm_head",
        kind("T5LayerNorm"): "(en|de)coder.block.*.layer.*.layer_norm (en|de)coder.final_layer_norm",
    },
)
def t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=8,
        d_ff=INNER,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=HEADS,
        dropout_rate=0.0,
        pad_token_id=PAD,
        decoder_start_token_id=PAD,
    )
    return hf.T5ForConditionalGeneration(config)


# Decoders ------------------------------------------------------------------------------------------------


@family(
    "GPT-2",
    language,
    {
        PRECONDITIONED: "transformer.h.*.attn.(c_attn|c_proj) transformer.h.*.mlp.(c_fc|c_proj)",
        EMBEDDING: "transformer.(wte|wpe)",
        TIED: "lm_head",
        NORM: "transformer.h.*.ln_(1|2) transformer.ln_f",
    },
    remark="Conv1D layers",
)
def gpt2() -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=2,
        n_head=HEADS,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=2,
    )
    return hf.GPT2LMHeadModel(config)


DECODER_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "max_position_embeddings": 32,
    "attention_dropout": 0.0,
    "pad_token_id": PAD,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
GROUPED_QUERIES = {"num_key_value_heads": 1, "head_dim": 8}
ATTENTION = "model.layers.*.self_attn.(q|k|v|o)_proj"
GATED = "model.layers.*.mlp.(gate|up|down)_proj"
DECODER_NORMS = "model.layers.*.(input|post_attention)_layernorm model.norm"


@family(
    "GPT-NeoX",
    language,
    {
        PRECONDITIONED: """
            gpt_neox.layers.*.attention.(query_key_value|dense) gpt_neox.layers.*.mlp.(dense_h_to_4h|dense_4h_to_h)
            lm_head
        """,
        EMBEDDING: "gpt_neox.embed_in",
        NORM: "gpt_neox.layers.*.(input|post_attention)_layernorm gpt_neox.final_layer_norm",
    },
)
def gpt_neox() -> nn.Module:
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**DECODER_SIZES))


@family(
    "OPT",
    language,
    {
        PRECONDITIONED: "model.decoder.layers.*.self_attn.(q|k|v|out)_proj",
        # On [samples * positions, features].
        NOT_THE_BATCH: "model.decoder.layers.*.fc(1|2)",
        EMBEDDING: "model.decoder.embed_tokens",
        kind("OPTLearnedPositionalEmbedding"): "model.decoder.embed_positions",
        TIED: "lm_head",
        NORM: "model.decoder.layers.*.(self_attn|final)_layer_norm model.decoder.final_layer_norm",
    },
    remark="fc1 and fc2 run on samples and positions folded together",
)
def opt() -> nn.Module:
    sizes = {key: value for key, value in DECODER_SIZES.items() if key != "intermediate_size"}
    return hf.OPTForCausalLM(hf.OPTConfig(**sizes, ffn_dim=INNER, word_embed_proj_dim=WIDTH, dropout=0.0))


@family(
    "Llama",
    language,
    {
        PRECONDITIONED: f"{ATTENTION} {GATED} lm_head",
        EMBEDDING: "model.embed_tokens",
        kind("LlamaRMSNorm"): DECODER_NORMS,
    },
)
def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER_SIZES, **GROUPED_QUERIES))


@family(
    "Qwen3",
    language,
    {
        PRECONDITIONED: f"{ATTENTION} {GATED} lm_head",
        EMBEDDING: "model.embed_tokens",
        kind("Qwen3RMSNorm"): f"{DECODER_NORMS} model.layers.*.self_attn.(q|k)_norm",
    },
)
def qwen3() -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER_SIZES, **GROUPED_QUERIES))


@family(
    "Gemma",
    language,
    {
        PRECONDITIONED: f"{ATTENTION} {GATED}",
        kind("GemmaTextScaledWordEmbedding"): "model.embed_tokens",
        TIED: "lm_head",
        kind("GemmaRMSNorm"): DECODER_NORMS,
    },
)
def gemma() -> nn.Module:
    return hf.GemmaForCausalLM(hf.GemmaConfig(**DECODER_SIZES, **GROUPED_QUERIES))


@family(
    "Mixtral",
    language,
    {
        PRECONDITIONED: f"{ATTENTION} lm_head",
        EMBEDDING: "model.embed_tokens",
        # Experts are three-dimensional parameters, the router a module of its own.
        kind("MixtralExperts"): "model.layers.*.mlp.experts.(gate_up_proj|down_proj)",
        kind("MixtralTopKRouter"): "model.layers.*.mlp.gate",
        kind("MixtralRMSNorm"): DECODER_NORMS,
    },
    oracle="captured",
    remark="experts and router are no Linear; the balancing loss couples the samples",
)
def mixtral() -> nn.Module:
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "output_router_logits": True}
    config = hf.MixtralConfig(**DECODER_SIZES, **GROUPED_QUERIES, **experts, router_aux_loss_coef=0.5)
    return hf.MixtralForCausalLM(config)


@family(
    "Mamba",
    language,
    {
        PRECONDITIONED: "backbone.layers.*.mixer.(in|x|out)_proj",
        # The mixer multiplies by its weight and adds its bias itself.
        NEVER_CALLED: "backbone.layers.*.mixer.dt_proj",
        kind("MambaMixer"): "backbone.layers.*.mixer.(A_log|D)",
        kind("Conv1d"): "backbone.layers.*.mixer.conv1d",
        EMBEDDING: "backbone.embeddings",
        TIED: "lm_head",
        kind("MambaRMSNorm"): "backbone.layers.*.norm backbone.norm_f",
    },
    remark="no attention; dt_proj is used past its forward; a fused kernel would pass more layers by",
)
def mamba() -> nn.Module:
    config = hf.MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        state_size=4,
        num_hidden_layers=2,
        time_step_rank=3,
        pad_token_id=PAD,
        bos_token_id=0,
        eos_token_id=2,
    )
    return hf.MambaForCausalLM(config)


# PEFT ----------------------------------------------------------------------------------------------------


ADAPTERS = "base_model.model.model.layers.*.self_attn.(q|v)_proj.lora_(A|B).default"


def adapted(**options: bool) -> nn.Module:
    targets = ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=3, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM", **options)
    with warnings.catch_warnings():
        # peft asks for an attribute that transformers is about to rename.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return peft.get_peft_model(llama(), config)


@family("PEFT LoRA on Llama", language, {PRECONDITIONED: ADAPTERS}, remark="the base weights are frozen")
def lora() -> nn.Module:
    return adapted()


@family(
    "PEFT DoRA on Llama",
    language,
    {
        # Once more for the norm of the adapted weight, on an identity matrix.
        CALLED_AGAIN: ADAPTERS,
        kind("DoraLinearLayer"): "base_model.model.model.layers.*.self_attn.(q|v)_proj.lora_magnitude_vector.default",
    },
    remark="the adapters are called twice: nothing is preconditioned",
)
def dora() -> nn.Module:
    return adapted(use_dora=True)
