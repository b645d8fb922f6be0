"""The classifiers: images `[N, 3, S, S]` to logits `[N, C]`."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput

from images.arguments import ModelArguments


class Perceptron(nn.Module):
    """ReLU layers of equal width on all pixels.

    Args:
        inputs: Pixels of an image, times channels.
        width: Units of a hidden layer.
        depth: Hidden layers.
        classes: Number of classes.
        dropout: Dropout behind each hidden layer.
    """

    def __init__(self, inputs: int, width: int, depth: int, classes: int, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in in [inputs, *[width] * (depth - 1)]:
            layers += [nn.Linear(fan_in, width), nn.ReLU()]
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
        self.layers = nn.Sequential(*layers, nn.Linear(width, classes))

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Return the logits, and with labels the mean cross entropy."""
        logits = self.layers(pixel_values)
        return ImageClassifierOutput(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)


def build_model(arguments: ModelArguments, image_size: int, classes: int) -> nn.Module:
    """Build a classifier, initialized from torch's global generator.

    Args:
        arguments: Kind and sizes.
        image_size: Pixels a side.
        classes: Number of classes.
    """
    if arguments.model == "mlp":
        inputs = 3 * image_size**2
        return Perceptron(inputs, arguments.hidden_size, arguments.num_layers, classes, arguments.dropout)
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
