"""Tiny models of images and sound, and of torch alone, and what is expected of each."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from hf_fngd.samples.rows import NOT_THE_BATCH
from tests.architectures.registry import (
    CLASSES,
    HEADS,
    INNER,
    PAD,
    VOCABULARY,
    WIDTH,
    Batch,
    family,
    images,
    labels,
    padded,
    signal,
    sized,
    token_labels,
)
from tests.architectures.text import BART_LINEARS

# Images --------------------------------------------------------------------------------------------------

family(
    "ViT",
    sized(hf.ViTForImageClassification, image_size=(8, 16), patch_size=4, num_labels=CLASSES),
    "vit.layers.*.attention.(q|k|v|o)_proj vit.layers.*.mlp.fc(1|2) classifier **.patch_embeddings.projection",
    batch=images(8, 16),
    square=9,
)


SWIN_SIZES = {
    **{"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2]},
    **{"window_size": 4, "mlp_ratio": 2.0, "drop_path_rate": 0.0, "num_labels": CLASSES},
}

family(
    "Swin",
    sized(hf.SwinForImageClassification, "num_layers", **SWIN_SIZES),
    # The second stage has a single window, so that its attention sees whole samples.
    """
        swin.encoder.layers.*.blocks.*.mlp.fc(1|2) swin.encoder.layers.0.downsample.reduction
        swin.encoder.layers.*.blocks.*.attention.(q|k|v|o)_proj classifier **.patch_embeddings.projection
    """,
    # Attention runs on [samples * windows, positions of a window, features]: four windows.
    batch=images(16, 16),
    square=16,
    remark="attention folds the windows into the batch, where a stage has several",
)


RESNET_SIZES = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}

family(
    "ResNet",
    sized(hf.ResNetForImageClassification, **RESNET_SIZES, num_labels=CLASSES),
    "**.convolution classifier.1",
    batch=images(16, 16),
    oracle="captured",
    remark="the batch statistics couple the samples",
    behind="classifier.1",
)

family(
    "ConvNeXt",
    sized(
        hf.ConvNextForImageClassification,
        hidden_sizes=[8, 16],
        depths=[1, 2],
        patch_size=2,
        num_stages=2,
        num_labels=CLASSES,
    ),
    """
        **.patch_embeddings **.dwconv **.downsampling_layer.1 **.pwconv(1|2) classifier
    """,
    batch=images(9, 8),
    remark="depthwise convolutions",
)


def maps(n: int, t: int) -> Batch:
    """Images of which every pixel has a class."""
    generator = torch.Generator().manual_seed(n)
    return images(16, 16)(n, t) | {"labels": torch.randint(CLASSES, (n, 16, 16), generator=generator)}


SEGFORMER_SIZES = {
    **{"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16]},
    **{"patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]},
    **{"decoder_hidden_size": 8, "num_labels": CLASSES},
}

family(
    "SegFormer",
    sized(hf.SegformerForSemanticSegmentation, **SEGFORMER_SIZES),
    """
        **.proj **.attention.(q|k|v|o)_proj **.sequence_reduction **.mlp.fc(1|2) **.dwconv
        decode_head.(linear_fuse|classifier)
    """,
    batch=maps,
    oracle="captured",
    square=16,
    remark="the decoder's batch statistics couple the samples",
    behind="decode_head.classifier",
)


def captions(n: int, t: int) -> Batch:
    return padded(n, t) | {"pixel_values": signal(n, 3, 12, 12), "return_loss": True}


def clip() -> nn.Module:
    tower = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": 1, "num_attention_heads": HEADS}
    tower |= {"projection_dim": 8}
    text = tower | {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "pad_token_id": PAD}
    text |= {"bos_token_id": 0, "eos_token_id": 2}
    vision = tower | {"image_size": 12, "patch_size": 4}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


family(
    "CLIP",
    clip,
    """
        (text|vision)_model.encoder.layers.*.(self_attn.(q|k|v|out)_proj|mlp.fc(1|2)) (text|visual)_projection
        vision_model.embeddings.patch_embedding
    """,
    batch=captions,
    oracle="captured",
    square=10,
    remark="the contrastive loss couples the samples",
)


# Sound ---------------------------------------------------------------------------------------------------


WHISPER_SIZES = {
    **{"num_mel_bins": 6, "max_source_positions": 8, "max_target_positions": 32},
    **{"suppress_tokens": None, "begin_suppress_tokens": None},
}
WAV2VEC2_SIZES = {
    **{"conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (4, 4), "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
    **{"apply_spec_augment": False, "mask_time_prob": 0.0, "ctc_loss_reduction": "mean"},
}


def speech(n: int, t: int) -> Batch:
    return {"input_features": signal(n, 6, 16), "labels": token_labels(n, t)}


family(
    "Whisper",
    sized(hf.WhisperForConditionalGeneration, **WHISPER_SIZES),
    f"{BART_LINEARS} model.encoder.conv(1|2)",
    batch=speech,
    tied="proj_out",
    remark="sinusoidal positions of the encoder are frozen",
)


def recordings(n: int, t: int) -> Batch:
    # Sixteen values a position; three labels a recording, none of them the blank.
    return {"input_values": signal(n, 16 * t), "labels": token_labels(n, 6)[:, 1:4].abs() % (VOCABULARY - 2) + 2}


family(
    "Wav2Vec2 (CTC)",
    sized(hf.Wav2Vec2ForCTC, **WAV2VEC2_SIZES),
    """
        wav2vec2.feature_extractor.conv_layers.*.conv
        wav2vec2.feature_projection.projection wav2vec2.encoder.layers.*.attention.(q|k|v|out)_proj
        wav2vec2.encoder.layers.*.feed_forward.(intermediate|output)_dense lm_head
    """,
    batch=recordings,
)


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


family(
    "nn.TransformerEncoder",
    lambda: Encoder(batch_first=True),
    "project encoder.layers.*.linear(1|2) classify",
    batch=series,
    remark="nn.MultiheadAttention multiplies by its weights itself",
)

family(
    "nn.TransformerEncoder (batch_first=False)",
    lambda: Encoder(batch_first=False),
    "project classify encoder.layers.*.linear(1|2)",
    batch=series,
    remark="the encoder has positions first",
)


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


family(
    "projected table",
    Table,
    "embed classify",
    {NOT_THE_BATCH: "project"},
    batch=series,
    remark="the table has no batch, but may have as many rows as there are samples",
)
