"""Gram matrices of convolutions: against each sample's own gradient by every route, their memory, and the cost rule."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_fngd.weights.gram import Route, cheaper_route
from hf_fngd.weights.patches import Geometry, gram_of_patches, patches
from tests.steps import Allocations

Shape = tuple[int, ...]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def gram_from_convolution(image: Tensor, grads: Tensor, of: Geometry) -> Tensor:
    """K / N, of each sample's gradient by torch's own backward."""
    groups, dims = image.shape[2], len(of.size)
    weight = image.new_zeros(groups * grads.shape[3], image.shape[3], *of.size)
    arguments: Any = (of.stride, of.padding, of.dilation, False, (0,) * dims, groups, (False, True, False))
    shares = []
    for x, g in zip(image.flatten(2, 3), grads.flatten(2, 3), strict=True):  # [S, C, *], rows of a sample
        shares.append(torch.ops.aten.convolution_backward(g, x, weight, None, *arguments)[1].flatten())
    h = torch.stack(shares)
    return h @ h.t()


# Size, stride, padding, dilation of the filter; spatial shape of the image; groups, channels of each in and out.
SETTINGS: list[tuple[Geometry, Shape, Shape]] = [
    (Geometry((3,), (1,), (0,), (1,)), (7,), (1, 2, 3)),
    (Geometry((1,), (2,), (0,), (1,)), (7,), (1, 3, 2)),
    (Geometry((3, 3), (1, 1), (1, 1), (1, 1)), (5, 6), (1, 4, 3)),
    (Geometry((3, 2), (2, 3), (1, 0), (2, 1)), (9, 11), (2, 3, 2)),
    (Geometry((5, 5), (4, 4), (2, 2), (1, 1)), (7, 7), (4, 1, 1)),
    (Geometry((2, 1, 3), (1, 2, 1), (1, 0, 1), (1, 1, 2)), (3, 5, 6), (3, 2, 1)),
]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("budget", [1, 2**11, 2**28])
@pytest.mark.parametrize("route", ["ghost", "formed", None])
@pytest.mark.parametrize(("of", "shape", "channels"), SETTINGS)
def test_every_route_yields_the_gram_matrix_of_the_samples_gradients(
    of: Geometry, shape: Shape, channels: Shape, route: Route | None, budget: int, rows: int
) -> None:
    groups, i, o = channels
    counts = [
        (size + 2 * padding - dilation * (k - 1) - 1) // stride + 1
        for size, k, stride, padding, dilation in zip(shape, *of, strict=True)
    ]
    image, grads = randn(5, rows, groups, i, *shape), randn(5, rows, groups, o, *counts)
    k = gram_of_patches(image, grads, of, memory_budget=budget, route=route)
    torch.testing.assert_close(k, gram_from_convolution(image, grads, of), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("budget", [1, 2**15, 2**17])
@pytest.mark.parametrize("channels", [(1, 16, 4), (16, 1, 1), (4, 4, 2)])
def test_temporary_memory_stays_within_the_budget_and_a_larger_one_is_used(channels: Shape, budget: int) -> None:
    (groups, i, o), of = channels, Geometry((3, 3), (1, 1), (1, 1), (1, 1))
    image, grads = randn(8, 1, groups, i, 6, 6), randn(8, 1, groups, o, 6, 6)
    smallest = 8 * 9 * (36 + o) * 8
    largest = []
    for allowed in (budget, 2**28):
        with Allocations(image, grads) as allocations:
            gram_of_patches(image, grads, of, memory_budget=allowed, route="formed")
        largest.append(allocations.largest)
    assert largest[0] <= max(budget, smallest)
    assert largest[0] < largest[1]


def test_on_a_cpu_the_patches_of_all_channels_are_not_held_at_once() -> None:
    of = Geometry((3, 3), (1, 1), (1, 1), (1, 1))
    image, grads = randn(8, 1, 1, 64, 16, 16), randn(8, 1, 1, 8, 16, 16)
    with Allocations(image, grads) as allocations:
        gram_of_patches(image, grads, of, memory_budget=2**28)
    assert allocations.largest <= 2**23 < patches(image, of, grads.shape[4:]).nbytes


def test_the_ghost_product_is_left_where_all_patches_take_more_than_half_of_the_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of, used = Geometry((3, 3), (1, 1), (1, 1), (1, 1)), []
    image, grads = randn(8, 1, 1, 16, 2, 2), randn(8, 1, 1, 16, 2, 2)

    def ghost(a: Tensor, g: Tensor, **options: Any) -> Tensor:
        used.append(options["memory_budget"])
        return a.new_zeros(len(a), len(a))

    monkeypatch.setattr("hf_fngd.weights.patches.gram_ghost", ghost)
    held = patches(image, of, grads.shape[4:]).nbytes
    for budget in (2 * held - 1, 2 * held):
        gram_of_patches(image, grads, of, memory_budget=budget)
    assert used == [held]


@pytest.mark.parametrize(
    ("channels", "size", "side", "route"),
    [
        # Measured on a CPU with 64 images: of ResNet's layers none is cheaper by the ghost product, of VGG's the last.
        ((16, 16), 3, 32, "formed"),
        ((64, 64), 3, 8, "formed"),
        ((64, 128), 3, 8, "formed"),
        ((256, 64), 1, 8, "formed"),
        ((256, 256), 3, 4, "ghost"),
        ((512, 512), 3, 4, "ghost"),
        ((512, 512), 3, 2, "ghost"),
        ((1, 1), 3, 8, "formed"),  # depthwise, a channel
    ],
)
def test_the_cheaper_route_is_the_one_measured(channels: Shape, size: int, side: int, route: Route) -> None:
    i, o = channels
    assert cheaper_route(64, side**2, i * math.prod((size, size)), o) == route
