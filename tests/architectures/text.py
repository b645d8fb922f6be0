"""Tiny models of text, encoders, encoder-decoders and decoders, PEFT's among them, and what is expected of each."""

from collections.abc import Callable

import peft
import torch
import transformers as hf
from torch import nn

from hf_fngd.engine.reasons import CALLED_AGAIN, NEVER_CALLED
from hf_fngd.samples.rows import NOT_THE_BATCH
from tests.architectures.registry import (
    CLASSES,
    PAD,
    WIDTH,
    Batch,
    classification,
    family,
    labels,
    sized,
    token_classification,
    tokens,
)
from tests.modes.nets import older_names

# Encoders of text ------------------------------------------------------------------------------------------


def bert_linears(prefix: str) -> str:
    layer = f"{prefix}.encoder.layer.*"
    return f"{layer}.attention.self.(query|key|value) {layer}.(attention.output|intermediate|output).dense"


family(
    "BERT (masked language model)",
    sized(hf.BertForMaskedLM),
    f"{bert_linears('bert')} cls.predictions.transform.dense",
    tied="cls.predictions.decoder",  # its weight is the word embedding, its bias that of the prediction head
)

family(
    "BERT (token classification)",
    sized(hf.BertForTokenClassification, num_labels=CLASSES),
    f"{bert_linears('bert')} classifier",
    batch=token_classification,
)


def choices(n: int, t: int) -> Batch:
    """Questions with three answers each."""
    return {"input_ids": tokens(n * CLASSES, t)["input_ids"].view(n, CLASSES, t), "labels": labels(n)}


family(
    "BERT (multiple choice)",
    sized(hf.BertForMultipleChoice),
    f"{bert_linears('bert')} bert.pooler.dense classifier",
    batch=choices,
    remark="the choices are folded into the batch",
)

family(
    "RoBERTa",
    sized(hf.RobertaForSequenceClassification, num_labels=CLASSES),
    f"{bert_linears('roberta')} classifier.(dense|out_proj)",
    batch=classification,
)

family(
    "DistilBERT",
    sized(hf.DistilBertForSequenceClassification, num_labels=CLASSES),
    "distilbert.transformer.layer.*.(attention.(q|k|v|out)_lin|ffn.lin(1|2)) pre_classifier classifier",
    batch=classification,
)


DEBERTA_SIZES = {
    **{"type_vocab_size": 0, "relative_attention": True, "position_buckets": 4, "pos_att_type": ["c2p", "p2c"]},
    **{"norm_rel_ebd": "layer_norm", "position_biased_input": False, "num_labels": CLASSES},
}
DEBERTA = "deberta.encoder.layer.*"
DEBERTA_REST = f"{DEBERTA}.attention.self.value_proj {DEBERTA}.(attention.output|intermediate|output).dense"
DEBERTA_REST += " pooler.dense classifier"

family(
    "DeBERTa-v2",
    sized(hf.DebertaV2ForSequenceClassification, **DEBERTA_SIZES, share_att_key=False),
    f"{DEBERTA}.attention.self.(query|key)_proj {DEBERTA_REST}",
    # They project the table of relative positions, [1, 2 * span, features], which has no batch.
    {NOT_THE_BATCH: f"{DEBERTA}.attention.self.pos_(query|key)_proj"},
    batch=classification,
    remark="the projections of the table of relative positions have no batch",
)

family(
    "DeBERTa-v2 (shared keys, as in v3)",
    sized(hf.DebertaV2ForSequenceClassification, **DEBERTA_SIZES, share_att_key=True),
    DEBERTA_REST,
    # They project the tokens, and once more the table of relative positions.
    {CALLED_AGAIN: f"{DEBERTA}.attention.self.(query|key)_proj"},
    batch=classification,
    remark="queries and keys serve tokens and relative positions",
)


ALBERT_LAYER = "albert.encoder.albert_layer_groups.*.albert_layers.*"

family(
    "ALBERT",
    sized(hf.AlbertForSequenceClassification, embedding_size=8, inner_group_num=1, num_labels=CLASSES),
    "albert.encoder.embedding_hidden_mapping_in albert.pooler classifier",
    # One layer's weights serve all layers.
    {CALLED_AGAIN: f"{ALBERT_LAYER}.attention.(query|key|value|dense) {ALBERT_LAYER}.(ffn|ffn_output)"},
    batch=classification,
    remark="its layers share their weights",
)


def replaced_tokens(n: int, t: int) -> Batch:
    """Every position has a label; no padding, or samples would have different numbers of them."""
    batch = tokens(n, t)
    return batch | {"labels": batch["input_ids"] % 2}


family(
    "ELECTRA",
    sized(hf.ElectraForPreTraining, embedding_size=8),
    f"electra.embeddings_project {bert_linears('electra')} discriminator_predictions.(dense|dense_prediction)",
    batch=replaced_tokens,
)


LONGFORMER = "longformer.encoder.layer.*"

family(
    "Longformer",
    sized(hf.LongformerForSequenceClassification, attention_window=4, num_labels=CLASSES),
    f"""
        {LONGFORMER}.(attention.output|intermediate|output).dense classifier.(dense|out_proj)
        {LONGFORMER}.attention.self.(query|key|value|query_global|key_global|value_global)
    """,
    # Attention runs on [positions, samples, features], the global queries on [global tokens, samples, features].
    batch=classification,
    remark="attention has positions first",
)


def segments(n: int, t: int) -> Batch:
    segment = (torch.arange(t) >= t // 2).long().expand(n, t)
    return classification(n, t) | {"token_type_ids": segment}


family(
    "XLNet",
    sized(hf.XLNetForSequenceClassification, num_labels=CLASSES),
    # [positions, samples, features] throughout the Transformer.
    "sequence_summary.summary logits_proj transformer.layer.*.ff.layer_(1|2)",
    batch=segments,
    remark="the Transformer has positions first, and attention has no Linear",
)


# Encoder-decoders. BART's descendants share its names; their heads are tied to the shared embedding. ------------

BART_LINEARS = "model.(en|de)coder.layers.*.((self_attn|encoder_attn).(q|k|v|out)_proj|fc(1|2))"
for name, cls, remark in (
    ("Marian", hf.MarianMTModel, "sinusoidal positions are not trained"),
    ("BART", hf.BartForConditionalGeneration, ""),
    ("Pegasus", hf.PegasusForConditionalGeneration, "sinusoidal positions are not trained"),
    ("M2M100", hf.M2M100ForConditionalGeneration, "sinusoidal positions are a buffer"),
):
    family(name, sized(cls, forced_eos_token_id=None), BART_LINEARS, tied="lm_head", remark=remark)

family(
    "T5",
    sized(hf.T5ForConditionalGeneration, d_kv=8, decoder_start_token_id=PAD),
    "(en|de)coder.block.*.layer.*.((SelfAttention|EncDecAttention).(q|k|v|o)|DenseReluDense.w(i|o))",
    tied="lm_head",
)


# Decoders ------------------------------------------------------------------------------------------------

family(
    "GPT-2",
    sized(hf.GPT2LMHeadModel),
    "transformer.h.*.attn.(c_attn|c_proj) transformer.h.*.mlp.(c_fc|c_proj)",
    tied="lm_head",
    remark="Conv1D layers",
)


GROUPED_QUERIES = {"num_key_value_heads": 1, "head_dim": 8}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5}
LLAMA = sized(hf.LlamaForCausalLM, **GROUPED_QUERIES)
ATTENTION = "model.layers.*.self_attn.(q|k|v|o)_proj"
GATED = "model.layers.*.mlp.(gate|up|down)_proj"

family(
    "GPT-NeoX",
    sized(hf.GPTNeoXForCausalLM),
    "gpt_neox.layers.*.(attention.(query_key_value|dense)|mlp.(dense_h_to_4h|dense_4h_to_h)) lm_head",
)

family(
    "OPT",
    sized(hf.OPTForCausalLM, word_embed_proj_dim=WIDTH),
    "model.decoder.layers.*.self_attn.(q|k|v|out)_proj model.decoder.layers.*.fc(1|2)",
    tied="lm_head",
    remark="fc1 and fc2 run on samples and positions folded together",
)

family(
    "Falcon",
    sized(hf.FalconForCausalLM, bias=True),
    "transformer.h.*.(self_attention.(query_key_value|dense)|mlp.(dense_h_to_4h|dense_4h_to_h))",
    tied="lm_head",
    remark="all of its layers are of a subclass of Linear",
)

family("Llama", LLAMA, f"{ATTENTION} {GATED} lm_head")

family("Qwen3", sized(hf.Qwen3ForCausalLM, **GROUPED_QUERIES), f"{ATTENTION} {GATED} lm_head")

family("Gemma", sized(hf.GemmaForCausalLM, **GROUPED_QUERIES), f"{ATTENTION} {GATED}", tied="lm_head")

family(
    "Mixtral",
    sized(hf.MixtralForCausalLM, **GROUPED_QUERIES, **EXPERTS),
    f"{ATTENTION} lm_head",
    oracle="captured",
    remark="experts and router are no Linear; the balancing loss couples the samples",
)

family(
    "Mamba",
    sized(hf.MambaForCausalLM, "intermediate_size", state_size=4, time_step_rank=3),
    "backbone.layers.*.mixer.(in|x|out)_proj",
    {NEVER_CALLED: "backbone.layers.*.mixer.(dt_proj|conv1d)"},
    tied="lm_head",
    remark="no attention; dt_proj and conv1d are used past their forward; a fused kernel would pass more layers by",
)


# PEFT ----------------------------------------------------------------------------------------------------


ADAPTERS = "base_model.model.model.layers.*.self_attn.(q|v)_proj.lora_(A|B).default"


def adapted(**options: bool) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        targets = ["q_proj", "v_proj"]
        config = peft.LoraConfig(r=3, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM", **options)
        with older_names():
            return peft.get_peft_model(LLAMA(), config)

    return build


family("PEFT LoRA on Llama", adapted(), ADAPTERS, remark="the base weights are frozen")

family(
    "PEFT DoRA on Llama",
    adapted(use_dora=True),
    "",
    {CALLED_AGAIN: ADAPTERS},  # once more for the norm of the adapted weight, on an identity matrix
    remark="the adapters are called twice: nothing is preconditioned",
)
