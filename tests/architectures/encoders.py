"""Encoders of text."""

import torch
import transformers as hf
from torch import nn

from hf_fngd.engine.layer import CALLED_AGAIN
from hf_fngd.layers.base import NOT_THE_BATCH
from tests.architectures.registry import (
    CLASSES,
    EMBEDDING,
    HEADS,
    INNER,
    NORM,
    PAD,
    PRECONDITIONED,
    TIED,
    VOCABULARY,
    WIDTH,
    Batch,
    classification,
    family,
    kind,
    labels,
    language,
    token_classification,
    tokens,
)

BERT_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "max_position_embeddings": 32,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "classifier_dropout": 0.0,
    "pad_token_id": PAD,
    "num_labels": CLASSES,
}


def bert_linears(prefix: str) -> str:
    layer = f"{prefix}.encoder.layer.*"
    return f"""
        {layer}.attention.self.(query|key|value) {layer}.attention.output.dense
        {layer}.intermediate.dense {layer}.output.dense
    """


def bert_embeddings(prefix: str) -> str:
    return f"{prefix}.embeddings.(word|position|token_type)_embeddings"


def bert_norms(prefix: str) -> str:
    return f"{prefix}.embeddings.LayerNorm {prefix}.encoder.layer.*.(attention.output|output).LayerNorm"


@family(
    "BERT (masked language model)",
    language,
    {
        PRECONDITIONED: f"{bert_linears('bert')} cls.predictions.transform.dense",
        EMBEDDING: bert_embeddings("bert"),
        # The decoder's weight is the word embedding, its bias that of the prediction head.
        TIED: "cls.predictions.decoder",
        kind("BertLMPredictionHead"): "cls.predictions",
        NORM: f"{bert_norms('bert')} cls.predictions.transform.LayerNorm",
    },
)
def bert() -> nn.Module:
    return hf.BertForMaskedLM(hf.BertConfig(**BERT_SIZES))


@family(
    "BERT (token classification)",
    token_classification,
    {
        PRECONDITIONED: f"{bert_linears('bert')} classifier",
        EMBEDDING: bert_embeddings("bert"),
        NORM: bert_norms("bert"),
    },
)
def bert_tokens() -> nn.Module:
    return hf.BertForTokenClassification(hf.BertConfig(**BERT_SIZES))


def choices(n: int, t: int) -> Batch:
    """Questions with three answers each."""
    return {"input_ids": tokens(n * CLASSES, t)["input_ids"].view(n, CLASSES, t), "labels": labels(n)}


@family(
    "BERT (multiple choice)",
    choices,
    {
        # The model folds [samples, choices, positions] into [samples * choices, positions] before its first layer.
        NOT_THE_BATCH: f"{bert_linears('bert')} bert.pooler.dense classifier",
        EMBEDDING: bert_embeddings("bert"),
        NORM: bert_norms("bert"),
    },
    remark="the choices are folded into the batch: nothing is preconditioned",
)
def bert_choices() -> nn.Module:
    return hf.BertForMultipleChoice(hf.BertConfig(**BERT_SIZES))


@family(
    "RoBERTa",
    classification,
    {
        PRECONDITIONED: f"{bert_linears('roberta')} classifier.(dense|out_proj)",
        EMBEDDING: bert_embeddings("roberta"),
        NORM: bert_norms("roberta"),
    },
)
def roberta() -> nn.Module:
    return hf.RobertaForSequenceClassification(hf.RobertaConfig(**BERT_SIZES))


@family(
    "DistilBERT",
    classification,
    {
        PRECONDITIONED: """
            distilbert.transformer.layer.*.attention.(q|k|v|out)_lin distilbert.transformer.layer.*.ffn.lin(1|2)
            pre_classifier classifier
        """,
        EMBEDDING: "distilbert.embeddings.(word|position)_embeddings",
        NORM: "distilbert.embeddings.LayerNorm distilbert.transformer.layer.*.(sa|output)_layer_norm",
    },
)
def distilbert() -> nn.Module:
    config = hf.DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=WIDTH,
        n_layers=2,
        n_heads=HEADS,
        hidden_dim=INNER,
        max_position_embeddings=32,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        pad_token_id=PAD,
        num_labels=CLASSES,
    )
    return hf.DistilBertForSequenceClassification(config)


DEBERTA_SIZES = BERT_SIZES | {
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_buckets": 4,
    "pos_att_type": ["c2p", "p2c"],
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "pooler_dropout": 0.0,
    "cls_dropout": 0.0,
}
DEBERTA = "deberta.encoder.layer.*"
DEBERTA_REST = f"""
    {DEBERTA}.attention.self.value_proj {DEBERTA}.attention.output.dense
    {DEBERTA}.intermediate.dense {DEBERTA}.output.dense pooler.dense classifier
"""
DEBERTA_EMBEDDINGS = "deberta.embeddings.word_embeddings deberta.encoder.rel_embeddings"


@family(
    "DeBERTa-v2",
    classification,
    {
        PRECONDITIONED: f"{DEBERTA}.attention.self.(query|key)_proj {DEBERTA_REST}",
        # They project the table of relative positions, [1, 2 * span, features], which has no batch.
        NOT_THE_BATCH: f"{DEBERTA}.attention.self.pos_(query|key)_proj",
        EMBEDDING: DEBERTA_EMBEDDINGS,
        NORM: f"{bert_norms('deberta')} deberta.encoder.LayerNorm",
    },
    remark="the projections of the table of relative positions have no batch",
)
def deberta() -> nn.Module:
    return hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**DEBERTA_SIZES, share_att_key=False))


@family(
    "DeBERTa-v2 (shared keys, as in v3)",
    classification,
    {
        PRECONDITIONED: DEBERTA_REST,
        # They project the tokens, and once more the table of relative positions.
        CALLED_AGAIN: f"{DEBERTA}.attention.self.(query|key)_proj",
        EMBEDDING: DEBERTA_EMBEDDINGS,
        NORM: f"{bert_norms('deberta')} deberta.encoder.LayerNorm",
    },
    remark="queries and keys serve tokens and relative positions",
)
def deberta_shared() -> nn.Module:
    return hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**DEBERTA_SIZES, share_att_key=True))


ALBERT_LAYER = "albert.encoder.albert_layer_groups.*.albert_layers.*"


@family(
    "ALBERT",
    classification,
    {
        PRECONDITIONED: "albert.encoder.embedding_hidden_mapping_in albert.pooler classifier",
        # One layer's weights serve all layers.
        CALLED_AGAIN: f"{ALBERT_LAYER}.attention.(query|key|value|dense) {ALBERT_LAYER}.(ffn|ffn_output)",
        EMBEDDING: bert_embeddings("albert"),
        NORM: f"albert.embeddings.LayerNorm {ALBERT_LAYER}.attention.LayerNorm {ALBERT_LAYER}.full_layer_layer_norm",
    },
    remark="its layers share their weights",
)
def albert() -> nn.Module:
    sizes = BERT_SIZES | {"embedding_size": 8, "inner_group_num": 1, "num_hidden_groups": 1}
    return hf.AlbertForSequenceClassification(hf.AlbertConfig(**sizes, classifier_dropout_prob=0.0))


def replaced_tokens(n: int, t: int) -> Batch:
    """Every position has a label; no padding, or samples would have different numbers of them."""
    batch = tokens(n, t)
    return batch | {"labels": batch["input_ids"] % 2}


@family(
    "ELECTRA",
    replaced_tokens,
    {
        PRECONDITIONED: f"""
            electra.embeddings_project {bert_linears("electra")}
            discriminator_predictions.(dense|dense_prediction)
        """,
        EMBEDDING: bert_embeddings("electra"),
        NORM: bert_norms("electra"),
    },
)
def electra() -> nn.Module:
    return hf.ElectraForPreTraining(hf.ElectraConfig(**BERT_SIZES, embedding_size=8))


LONGFORMER = "longformer.encoder.layer.*"


@family(
    "Longformer",
    classification,
    {
        PRECONDITIONED: f"""
            {LONGFORMER}.attention.output.dense {LONGFORMER}.intermediate.dense {LONGFORMER}.output.dense
            classifier.(dense|out_proj)
        """,
        # Attention runs on [positions, samples, features], the global queries on [global tokens, samples, features].
        NOT_THE_BATCH: f"{LONGFORMER}.attention.self.(query|key|value|query_global|key_global|value_global)",
        EMBEDDING: bert_embeddings("longformer"),
        NORM: bert_norms("longformer"),
    },
    remark="attention has positions first",
)
def longformer() -> nn.Module:
    return hf.LongformerForSequenceClassification(hf.LongformerConfig(**BERT_SIZES, attention_window=4))


def segments(n: int, t: int) -> Batch:
    segment = (torch.arange(t) >= t // 2).long().expand(n, t)
    return classification(n, t) | {"token_type_ids": segment}


@family(
    "XLNet",
    segments,
    {
        PRECONDITIONED: "sequence_summary.summary logits_proj",
        # [positions, samples, features] throughout the Transformer.
        NOT_THE_BATCH: "transformer.layer.*.ff.layer_(1|2)",
        # Projections are three-dimensional parameters of the attention itself.
        kind("XLNetRelativeAttention"): """
            transformer.layer.*.rel_attn.(q|k|v|o|r) transformer.layer.*.rel_attn.(r_r_bias|r_s_bias|r_w_bias|seg_embed)
        """,
        # Only for two-stream attention, which classification does not have: it gets no gradient.
        kind("XLNetModel"): "transformer.mask_emb",
        EMBEDDING: "transformer.word_embedding",
        NORM: "transformer.layer.*.(rel_attn|ff).layer_norm",
    },
    remark="the Transformer has positions first, and attention has no Linear",
)
def xlnet() -> nn.Module:
    config = hf.XLNetConfig(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        n_layer=2,
        n_head=HEADS,
        d_inner=INNER,
        dropout=0.0,
        summary_last_dropout=0.0,
        pad_token_id=PAD,
        num_labels=CLASSES,
    )
    return hf.XLNetForSequenceClassification(config)
