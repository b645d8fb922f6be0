"""Families that read images and sound, and plain torch modules."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

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
    family,
    images,
    kind,
    labels,
    padded,
    signal,
    token_labels,
)

CONV1D, CONV2D = kind("Conv1d"), kind("Conv2d")

# Images --------------------------------------------------------------------------------------------------


@family(
    "ViT",
    images(8, 16),
    {
        PRECONDITIONED: "vit.layers.*.attention.(q|k|v|o)_proj vit.layers.*.mlp.fc(1|2) classifier",
        kind("ViTEmbeddings"): "vit.embeddings.(cls_token|position_embeddings)",
        CONV2D: "vit.embeddings.patch_embeddings.projection",
        NORM: "vit.layers.*.layernorm_(before|after) vit.layernorm",
    },
    square=9,
)
def vit() -> nn.Module:
    config = hf.ViTConfig(
        image_size=(8, 16),
        patch_size=4,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=CLASSES,
    )
    return hf.ViTForImageClassification(config)


@family(
    "Swin",
    images(16, 16),
    {
        # The second stage has a single window, so that its attention sees whole samples.
        PRECONDITIONED: """
            swin.encoder.layers.*.blocks.*.mlp.fc(1|2) swin.encoder.layers.0.downsample.reduction
            swin.encoder.layers.1.blocks.*.attention.(q|k|v|o)_proj classifier
        """,
        # Attention runs on [samples * windows, positions of a window, features]: four windows.
        NOT_THE_BATCH: "swin.encoder.layers.0.blocks.*.attention.(q|k|v|o)_proj",
        kind("SwinRelativePositionBias"): """
            swin.encoder.layers.*.blocks.*.attention.relative_position_bias.relative_position_bias_table
        """,
        CONV2D: "swin.embeddings.patch_embeddings.projection",
        NORM: """
            swin.embeddings.norm swin.encoder.layers.*.blocks.*.layernorm_(before|after)
            swin.encoder.layers.0.downsample.norm swin.layernorm
        """,
    },
    square=16,
    remark="attention folds the windows into the batch, where a stage has several",
)
def swin() -> nn.Module:
    config = hf.SwinConfig(
        image_size=16,
        patch_size=2,
        embed_dim=8,
        depths=[2, 1],
        num_heads=[1, 2],
        window_size=4,
        mlp_ratio=2.0,
        drop_path_rate=0.0,
        num_labels=CLASSES,
    )
    return hf.SwinForImageClassification(config)


@family(
    "ResNet",
    images(16, 16),
    {
        PRECONDITIONED: "classifier.1",
        CONV2D: "resnet.**.convolution",
        kind("BatchNorm2d"): "resnet.**.normalization",
    },
    oracle="captured",
    remark="convolutions are not preconditioned; the batch statistics couple the samples",
)
def resnet() -> nn.Module:
    config = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=CLASSES
    )
    return hf.ResNetForImageClassification(config)


def captions(n: int, t: int) -> Batch:
    return padded(n, t) | {"pixel_values": signal(n, 3, 12, 12), "return_loss": True}


@family(
    "CLIP",
    captions,
    {
        PRECONDITIONED: """
            (text|vision)_model.encoder.layers.*.self_attn.(q|k|v|out)_proj
            (text|vision)_model.encoder.layers.*.mlp.fc(1|2) (text|visual)_projection
        """,
        EMBEDDING: "text_model.embeddings.(token|position)_embedding vision_model.embeddings.position_embedding",
        kind("CLIPVisionEmbeddings"): "vision_model.embeddings.class_embedding",
        CONV2D: "vision_model.embeddings.patch_embedding",
        kind("CLIPModel"): "logit_scale",
        NORM: """
            (text|vision)_model.encoder.layers.*.layer_norm(1|2) text_model.final_layer_norm
            vision_model.(pre_layrnorm|post_layernorm)
        """,
    },
    oracle="captured",
    square=10,
    remark="the contrastive loss couples the samples",
)
def clip() -> nn.Module:
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "projection_dim": 8,
    }
    text = tower | {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "pad_token_id": PAD}
    text |= {"bos_token_id": 0, "eos_token_id": 2}
    vision = tower | {"image_size": 12, "patch_size": 4}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


# Sound ---------------------------------------------------------------------------------------------------


def speech(n: int, t: int) -> Batch:
    return {"input_features": signal(n, 6, 16), "labels": token_labels(n, t)}


@family(
    "Whisper",
    speech,
    {
        PRECONDITIONED: """
            model.(en|de)coder.layers.*.(self_attn|encoder_attn).(q|k|v|out)_proj model.(en|de)coder.layers.*.fc(1|2)
        """,
        CONV1D: "model.encoder.conv(1|2)",
        EMBEDDING: "model.decoder.embed_tokens",
        kind("WhisperPositionalEmbedding"): "model.decoder.embed_positions",
        TIED: "proj_out",
        NORM: """
            model.(en|de)coder.layers.*.(self_attn|encoder_attn|final)_layer_norm model.(en|de)coder.layer_norm
        """,
    },
    remark="sinusoidal positions of the encoder are frozen",
)
def whisper() -> nn.Module:
    config = hf.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=6,
        d_model=WIDTH,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=INNER,
        decoder_ffn_dim=INNER,
        max_source_positions=8,
        max_target_positions=32,
        pad_token_id=PAD,
        bos_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=PAD,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return hf.WhisperForConditionalGeneration(config)


def recordings(n: int, t: int) -> Batch:
    # Sixteen values a position; three labels a recording, none of them the blank.
    return {"input_values": signal(n, 16 * t), "labels": token_labels(n, 6)[:, 1:4].abs() % (VOCABULARY - 2) + 2}


@family(
    "Wav2Vec2 (CTC)",
    recordings,
    {
        PRECONDITIONED: """
            wav2vec2.feature_projection.projection wav2vec2.encoder.layers.*.attention.(q|k|v|out)_proj
            wav2vec2.encoder.layers.*.feed_forward.(intermediate|output)_dense lm_head
        """,
        CONV1D: "wav2vec2.feature_extractor.conv_layers.*.conv",
        kind("GroupNorm"): "wav2vec2.feature_extractor.conv_layers.0.layer_norm",
        kind("ParametrizedConv1d"): "wav2vec2.encoder.pos_conv_embed.conv",
        kind("ParametrizationList"): "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original(0|1)",
        NORM: """
            wav2vec2.feature_projection.layer_norm wav2vec2.encoder.layer_norm
            wav2vec2.encoder.layers.*.(layer_norm|final_layer_norm)
        """,
    },
)
def wav2vec2() -> nn.Module:
    config = hf.Wav2Vec2Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        conv_dim=(8, 8),
        conv_kernel=(4, 4),
        conv_stride=(4, 4),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        final_dropout=0.0,
        layerdrop=0.0,
        apply_spec_augment=False,
        mask_time_prob=0.0,
        ctc_loss_reduction="mean",
        pad_token_id=PAD,
        bos_token_id=0,
        eos_token_id=2,
    )
    return hf.Wav2Vec2ForCTC(config)


# Plain torch ---------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A classifier of series around nn.TransformerEncoder."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, dropout=0.0, batch_first=batch_first)
        self.batch_first = batch_first
        self.project = nn.Linear(4, WIDTH)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classify = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        y = self.project(x)
        y = self.encoder(y) if self.batch_first else self.encoder(y.transpose(0, 1)).transpose(0, 1)
        return SimpleNamespace(loss=F.cross_entropy(self.classify(y.mean(1)), labels))


def series(n: int, t: int) -> Batch:
    return {"x": signal(n, t, 4), "labels": labels(n)}


# The attention's own projections are parameters beside a Linear that is never called.
ENCODER_PLAIN = {
    kind("MultiheadAttention"): "encoder.layers.*.self_attn.in_proj_(weight|bias)",
    kind("NonDynamicallyQuantizableLinear"): "encoder.layers.*.self_attn.out_proj",
    NORM: "encoder.layers.*.norm(1|2)",
}


@family(
    "nn.TransformerEncoder",
    series,
    {PRECONDITIONED: "project encoder.layers.*.linear(1|2) classify"} | ENCODER_PLAIN,
    remark="nn.MultiheadAttention multiplies by its weights itself",
)
def encoder() -> nn.Module:
    return Encoder(batch_first=True)


@family(
    "nn.TransformerEncoder (batch_first=False)",
    series,
    {PRECONDITIONED: "project classify", NOT_THE_BATCH: "encoder.layers.*.linear(1|2)"} | ENCODER_PLAIN,
    remark="the encoder has positions first",
)
def encoder_sequence_first() -> nn.Module:
    return Encoder(batch_first=False)


class Table(nn.Module):
    """Adds a projection of its own positions, [eight, features], to the series."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(8, WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.embed = nn.Linear(4, WIDTH)
        self.classify = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        positions = self.project(self.positions.weight)
        y = torch.tanh(self.embed(x) + positions[: x.shape[1]])
        return SimpleNamespace(loss=F.cross_entropy(self.classify(y.mean(1)), labels))


@family(
    "projected table",
    series,
    {PRECONDITIONED: "embed classify", NOT_THE_BATCH: "project", EMBEDDING: "positions"},
    remark="as many rows in the table as samples look like samples",
)
def table() -> nn.Module:
    return Table()
