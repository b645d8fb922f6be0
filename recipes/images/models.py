"""The classifiers: images `[N, 3, S, S]` to logits `[N, C]`."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.modeling_outputs import ImageClassifierOutput

from images.arguments import WIDE_RESNETS, ModelArguments
from images.convolutional import VGG, BasicResNet, BasicResNetConfig, VGGConfig


class PerceptronConfig(PreTrainedConfig):
    """Size of a `Perceptron`; `num_labels`, the number of classes, is transformers' own."""

    model_type = "perceptron"
    image_size: int = 16
    hidden_size: int = 512
    num_hidden_layers: int = 2
    dropout: float = 0.0


class Perceptron(PreTrainedModel):
    """ReLU layers of equal width on all pixels, each with dropout behind it, initialized as torch does."""

    config_class = PerceptronConfig
    main_input_name = "pixel_values"

    def __init__(self, config: PerceptronConfig) -> None:
        super().__init__(config)
        layers: list[nn.Module] = [nn.Flatten()]
        width = 3 * config.image_size**2
        for _ in range(config.num_hidden_layers):
            layers += [nn.Linear(width, config.hidden_size), nn.ReLU()]
            if config.dropout > 0:
                layers.append(nn.Dropout(config.dropout))
            width = config.hidden_size
        self.layers = nn.Sequential(*layers, nn.Linear(width, config.num_labels))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave every layer as torch made it."""

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Return the logits, and with labels the mean cross entropy."""
        logits = self.layers(pixel_values)
        return ImageClassifierOutput(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)


def build_model(arguments: ModelArguments, image_size: int, classes: int) -> PreTrainedModel:
    """Build a classifier of images of so many pixels a side, initialized from torch's global generator."""
    if arguments.model == "resnet":
        return BasicResNet(
            BasicResNetConfig(
                depths=arguments.stages,
                width=arguments.hidden_size,
                projections=arguments.num_layers in WIDE_RESNETS,
                num_labels=classes,
            )
        )
    if arguments.model == "vgg":
        return VGG(VGGConfig(stages=arguments.stages, width=arguments.hidden_size, num_labels=classes))
    if arguments.model == "convnext":
        return ConvNextForImageClassification(
            ConvNextConfig(
                hidden_sizes=[arguments.hidden_size * 2**stage for stage in range(4)],
                depths=[2, 2, 6, 2],
                image_size=image_size,
                patch_size=arguments.patch_size,
                num_labels=classes,
            )
        )
    if arguments.model == "mlp":
        return Perceptron(
            PerceptronConfig(
                image_size=image_size,
                hidden_size=arguments.hidden_size,
                num_hidden_layers=arguments.num_layers,
                dropout=arguments.dropout,
                num_labels=classes,
            )
        )
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=arguments.hidden_size,
            num_hidden_layers=arguments.num_layers,
            num_attention_heads=arguments.num_heads,
            intermediate_size=4 * arguments.hidden_size,
            hidden_dropout_prob=arguments.dropout,
            attention_probs_dropout_prob=0.0,
            image_size=image_size,
            patch_size=arguments.patch_size,
            num_labels=classes,
        )
    )
