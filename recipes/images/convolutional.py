"""The convolutional classifiers of the paper's tables, as PreTrainedModels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class ConvolutionalClassifier(PreTrainedModel):
    """What both have in common: `features` `[N, 3, S, S]` to `[N, C, s, s]`, their mean over s x s, a Linear."""

    main_input_name = "pixel_values"
    features: nn.Module
    head: nn.Linear

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """He et al. (2015) for convolutions; torch's own for all others."""
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Return the logits, and with labels the mean cross entropy."""
        logits = self.head(self.features(pixel_values).mean(dim=(2, 3)))
        return ImageClassifierOutput(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)


class BasicResNetConfig(PreTrainedConfig):
    """Size of a `BasicResNet`.

    Attributes:
        depths: Blocks of each stage. (3, 3, 3) is ResNet-20, (5, 5, 5) ResNet-32, (2, 2, 2, 2) ResNet-18, (3, 4, 6, 3)
            ResNet-34.
        width: Channels of the first stage; each later one has twice as many on half the pixels.
        projections: Whether a shortcut that changes the shape is a convolution (option B of He et al. 2016), as in the
            networks for ImageNet, or takes every second pixel and fills up with zeros (option A), as in those for
            CIFAR-10.
    """

    model_type = "basic_resnet"
    depths: tuple[int, ...] = (3, 3, 3)
    width: int = 16
    projections: bool = False


class BasicResNet(ConvolutionalClassifier):
    """A residual network of basic blocks behind a 3 x 3 convolution, for small images (He et al. 2016, Sec. 4.2)."""

    config_class = BasicResNetConfig

    def __init__(self, config: BasicResNetConfig) -> None:
        super().__init__(config)
        width = config.width
        layers: list[nn.Module] = [convolution(3, width), nn.BatchNorm2d(width), nn.ReLU()]
        for stage, blocks in enumerate(config.depths):
            for number in range(blocks):
                stride = 2 if stage and not number else 1
                layers.append(BasicBlock(width, width * stride, stride, config.projections))
                width *= stride
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(width, config.num_labels)
        self.post_init()


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions, each with batch norm, and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int, projection: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            convolution(inputs, outputs, stride=stride),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            convolution(outputs, outputs),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            projected = nn.Sequential(convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
            self.shortcut = projected if projection else Subsample(outputs - inputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Add up body and shortcut."""
        return F.relu(self.body(x) + self.shortcut(x))


class Subsample(nn.Module):
    """Every so many pixels, and channels of zeros behind those that are there."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, S, S]` to `[N, C + channels, S / stride, S / stride]`."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.channels))


class VGGConfig(PreTrainedConfig):
    """Size of a `VGG`.

    Attributes:
        stages: The widths of each stage's convolutions in those of the first; (1,), (2,), (4, 4), (8, 8), (8, 8) is
            VGG-11.
        width: Channels of the first stage.
    """

    model_type = "vgg_bn"
    stages: tuple[tuple[int, ...], ...] = ((1,), (2,), (4, 4), (8, 8), (8, 8))
    width: int = 64


class VGG(ConvolutionalClassifier):
    """3 x 3 convolutions with batch norm and pooling (Simonyan & Zisserman 2015), one Linear behind, as for CIFAR-10.

    Images of fewer than 32 pixels a side are pooled as long as there is more than one pixel.
    """

    config_class = VGGConfig

    def __init__(self, config: VGGConfig) -> None:
        super().__init__(config)
        channels, layers = 3, list[nn.Module]()
        for stage in config.stages:
            for factor in stage:
                outputs = factor * config.width
                layers += [convolution(channels, outputs), nn.BatchNorm2d(outputs), nn.ReLU()]
                channels = outputs
            layers.append(Halve())
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, config.num_labels)
        self.post_init()


class Halve(nn.Module):
    """The largest of 2 x 2 pixels; one pixel stays."""

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, S, S]` to `[N, C, S / 2, S / 2]`."""
        return F.max_pool2d(x, 2) if min(x.shape[2:]) > 1 else x


def convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    """A convolution without a bias, which a batch norm has behind it."""
    return nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)
