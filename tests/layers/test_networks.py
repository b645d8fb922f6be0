"""Convolutional networks: every weighted gradient against the samples' own, each of which runs alone, in float64.

BatchNorm has fixed statistics, or the samples would not be apart.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fngd import FNGDPreconditioner
from tests.nets import EVERY_TYPE
from tests.reference import Clipping, Dense, float64, per_sample_gradients, uses_of
from tests.steps import relative_error

SAMPLES, CLASSES, DAMPING = 4, 3, 0.01


class Residual(nn.Module):
    """A basic block (He et al. 2016); where the shape changes, its shortcut is a convolution."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.shortcut = nn.Conv2d(i, o, 1, stride, bias=False) if i != o else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y.add_(self.shortcut(x)))


def resnet20() -> nn.Module:
    """Three blocks a stage, and so 20 layers, thin."""
    blocks = [Residual(i, o, 1 + (i != o)) for i, o in [(4, 4)] * 3 + [(4, 6)] + [(6, 6)] * 2 + [(6, 8)] + [(8, 8)] * 2]
    stem = [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))


def vgg11() -> nn.Module:
    """Its eight convolutions with BatchNorm, thin; the last ones see images of 2 x 2 and 1 x 1."""
    layers: list[nn.Module] = []
    before = 3
    for width in (4, "pool", 5, "pool", 6, 6, "pool", 7, 7, "pool", 8, 8):
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            before = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, CLASSES))


class UNet(nn.Module):
    """GroupNorm, a depthwise and a dilated convolution, transposed ones, and skip connections; a map of classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 6, 3, 2, 1)
        self.norm1, self.norm2 = nn.GroupNorm(2, 4), nn.GroupNorm(3, 6)
        self.middle = nn.Sequential(
            nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=2), nn.SiLU(), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        )
        self.up, self.last = nn.ConvTranspose2d(6, 4, 2, 2, groups=2), nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = F.silu(self.norm1(self.first(x)))
        low = F.silu(self.norm2(self.down(first)))
        low = low + self.middle(low)
        return self.last(torch.cat([first, self.up(low)], dim=1))


class Video(nn.Module):
    """Frames are folded into the batch for a convolution of images, and are the positions of another behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.frame, self.time, self.head = nn.Conv2d(2, 5, 3, 2), nn.Conv1d(5, 6, 2), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.frame(x.flatten(0, 1)).mean((2, 3)).view(*x.shape[:2], -1)
        return self.head(torch.tanh(self.time(y.transpose(1, 2))).mean(2))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-20": (resnet20, (3, 9, 11)),
    "VGG-11": (vgg11, (3, 16, 16)),
    "U-Net": (UNet, (3, 6, 8)),
    "frames": (Video, (3, 2, 5, 6)),
}


def network(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The model, images of which the first one is ten times as bright, and labels."""
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    model = build().double().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            nn.init.normal_(module.weight, 1.0, 0.2)
            nn.init.normal_(module.running_mean, 0.0, 0.2)
    x = torch.randn(SAMPLES, *shape, dtype=torch.float64)
    x[0] *= 10
    return model, x, torch.randint(CLASSES, (SAMPLES, *(shape[1:] if name == "U-Net" else ())))


def weighed(model: nn.Module, x: Tensor, y: Tensor, **settings: Any) -> tuple[nn.Module, Any]:
    """A copy after a backward pass, and its coverage."""
    model = copy.deepcopy(model)
    engine = FNGDPreconditioner(model, **settings)
    F.cross_entropy(model(x), y).backward()
    engine.step()
    return model, engine.coverage()


def alone(x: Tensor, y: Tensor) -> Callable[[nn.Module, int], Tensor]:
    return lambda model, n: F.cross_entropy(model(x[n : n + 1]), y[n : n + 1])


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_equation_9(name: str) -> None:
    plain, x, y = network(name)
    model, report = weighed(plain, x, y, sharing="never", damping=DAMPING)
    layers = [name for name, module in plain.named_modules() if hasattr(module, "weight") and module.weight.dim() > 1]
    owned = {f"{layer}.{leaf}" for layer in layers for leaf, _ in plain.get_submodule(layer).named_parameters()}
    assert (set(report.preconditioned), report.missed) == (owned, {})
    for layer in layers:
        of = list(plain.get_submodule(layer).parameters())
        exact = Dense(per_sample_gradients(plain, of, alone(x, y), SAMPLES), DAMPING)
        found = torch.cat([p.grad.flatten() for p in model.get_submodule(layer).parameters()])
        assert relative_error(found, exact.p) < 1e-9, layer
        assert relative_error(found, exact.u.mean(dim=1)) > 1e-3, layer
    F.cross_entropy(plain(x), y).backward()
    for leaf in report.plain:
        assert relative_error(model.get_parameter(leaf).grad, plain.get_parameter(leaf).grad) < 1e-12, leaf


# The reference does not know that the norm of a sample is the sum of its frames'.
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "frames"])
def test_gradients_are_the_sums_of_the_clipped_samples(name: str) -> None:
    plain, x, y = network(name)
    model, report = weighed(plain, x, y, layer_types=EVERY_TYPE)
    modules = list(dict.fromkeys(leaf.rpartition(".")[0] for leaf in (*report.preconditioned, *report.weighed)))
    one = alone(x, y)
    with float64():
        uses = [
            uses_of(plain, modules, lambda model, n: one(model, n) / SAMPLES, n, dict(plain.named_parameters()))
            for n in range(SAMPLES)
        ]
    expected, _ = Clipping().gradients(uses)
    assert set(expected) == {*report.preconditioned, *report.weighed}
    for leaf, g in expected.items():
        assert relative_error(model.get_parameter(leaf).grad.flatten(), g) < 1e-9, leaf
