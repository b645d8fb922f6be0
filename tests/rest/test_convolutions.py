"""Convolutions: the samples of those whose input needs no gradient are weighed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_fngd import FNGDPreconditioner
from tests.rest.setting import gradients, kept

SAMPLES, CHANNELS, SIZE = 5, 2, 6


class Vision(nn.Module):
    """Patches of 3 x 3 pixels, a second convolution over them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(CHANNELS, 4, kernel_size=3, stride=3)
        self.mixing = nn.Conv2d(4, 3, kernel_size=2)
        self.head = nn.Linear(3, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.leaky_relu(self.mixing(F.leaky_relu(self.patches(x)))).flatten(1))


def setting() -> tuple[Vision, Tensor]:
    """A model, and images the first of which has pixels a hundred times as large."""
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, CHANNELS, SIZE, SIZE, dtype=torch.float64)
    x[0] *= 100
    return Vision().double(), x


def losses(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).square().sum(1)


def of_samples(net: Vision, x: Tensor) -> list[dict[str, Tensor]]:
    """Each sample's gradients, by autograd alone."""
    found = []
    for n in range(len(x)):
        plain = copy.deepcopy(net)
        (losses(plain, x[n : n + 1]).sum() / len(x)).backward()
        found.append(gradients(plain))
    return found


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("compiled", [False, True])
def test_samples_are_clipped_at_the_mean_norm(compiled: bool) -> None:
    net, x = setting()
    each, seen = of_samples(net, x), list[Tensor]()
    probe = copy.deepcopy(net)
    probe.patches.register_forward_hook(
        lambda *args: args[2].register_hook(lambda g: seen.append(g.flatten(1).norm(dim=1))) and None
    )
    losses(probe, x).mean().backward()
    norms = seen[0] * x.flatten(1).norm(dim=1)
    w = (norms.mean() / norms).clamp(max=1)
    assert float(w.min()) < 0.5
    preconditioner = FNGDPreconditioner(net)
    run = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
    losses(run, x).mean().backward()
    preconditioner.step()
    found = gradients(net)
    for name in ("patches.weight", "patches.bias"):
        torch.testing.assert_close(found[name], sum(f * one[name] for f, one in zip(w, each, strict=True)))
    for name in ("mixing.weight", "mixing.bias"):  # behind the weights, and untouched by them
        torch.testing.assert_close(found[name], sum(one[name] for one in each))
    report = preconditioner.coverage()
    assert report.weighed == ("patches.weight", "patches.bias")
    assert report.plain["mixing.weight"] == "its input needs a gradient, which weights would change"


def test_other_policies_have_the_mean_weights_of_the_layers() -> None:
    net, x = setting()
    preconditioner = FNGDPreconditioner(net, 0.01, sharing="last", coefficient_steps=1, refresh=0)
    losses(net, x).mean().backward()
    preconditioner.step()
    net.zero_grad()
    losses(net, x).mean().backward()
    expected = sum(f * one["patches.weight"] for f, one in zip(kept(preconditioner), of_samples(net, x), strict=True))
    torch.testing.assert_close(gradients(net)["patches.weight"], expected)


def test_an_image_without_a_batch_is_not_weighed() -> None:
    net, x = setting()
    FNGDPreconditioner(net)
    net.patches(x[0]).sum().backward()
    assert net.patches.weight.grad is not None


def test_a_part_of_it_that_is_frozen_stays_as_it_is() -> None:
    net, x = setting()
    net.patches.bias.requires_grad_(False)
    preconditioner = FNGDPreconditioner(net)
    losses(net, x).mean().backward()
    preconditioner.step()
    assert preconditioner.coverage().weighed == ("patches.weight",)
    assert net.patches.bias.grad is None
