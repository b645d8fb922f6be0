"""The Gram matrix of a convolution (Eq. 13): ``h_n = sum_t g[n, t] a[n, t]^T``, where a's rows are patches of an image.

A patch is what the filter sees at one position. In a group of channels it has ``I k`` entries: I channels times the k
entries of the filter. All patches together are k times as large as the image. Where memory is short they are never held
at once: h is formed for a slice of input channels at a time, from the patches of these channels alone.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_fngd.weights.gram import Route, cheaper_route, gram_ghost


class Geometry(NamedTuple):
    """How a filter goes over an image, by dimension."""

    size: tuple[int, ...]  # of the filter
    stride: tuple[int, ...]
    padding: tuple[int, ...]  # with zeros, on both sides
    dilation: tuple[int, ...]


def patches(image: Tensor, of: Geometry, counts: torch.Size) -> Tensor:
    """From images ``[N, S, G, I, *]``, S of them a sample, to patches ``[N, G, I k, S T]`` at T positions.

    ``counts`` are the numbers of positions by dimension; an image may have room for more.
    """
    x = F.pad(image, [both for padding in reversed(of.padding) for both in (padding, padding)])
    for dim, count in enumerate(counts, start=4):
        size, stride, _, dilation = (values[dim - 4] for values in of)
        x = x.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation].narrow(dim, 0, count)
    dims = len(counts)
    positions, entries = range(4, 4 + dims), range(4 + dims, 4 + 2 * dims)
    x = x.permute(0, 2, 3, *entries, 1, *positions)
    return x.reshape(*x.shape[:2], x.shape[2] * math.prod(of.size), -1)


def gram_of_patches(
    image: Tensor, grads: Tensor, of: Geometry, *, memory_budget: int, route: Route | None = None
) -> Tensor:
    """K / N ``[N, N]``, symmetric, of images ``[N, S, G, I, *]`` and output gradients ``[N, S, G, O, *]`` of one dtype.

    Groups of channels G have filters of their own. ``memory_budget`` bounds the temporary memory, in bytes, down to the
    smallest block, one input channel. No ``route`` means the cheaper one. The ghost product needs all patches of a
    group, so it is left where these take more than half of the budget.
    """
    n, _, groups, channels = image.shape[:4]
    counts = grads.shape[4:]
    # [N, G, O, S T]
    g = grads.transpose(1, 2).transpose(2, 3).flatten(3)
    features, t = g.shape[2:]
    entries, item = math.prod(of.size), image.element_size()
    k = image.new_zeros(n, n)
    fits = 2 * n * channels * entries * t * item <= memory_budget
    if (route or cheaper_route(n, t, channels * entries, features)) == "ghost" and fits:
        for group in range(groups):
            a = patches(image[:, :, group : group + 1], of, counts)
            k += gram_ghost(a[:, 0].mT, g[:, group].mT, bias=False, memory_budget=memory_budget // 2)
        return k
    # In bytes, as in `gram_formed`; the patches of one channel may already be more than what a cache holds.
    preferred = (8 if image.device.type == "cpu" else 256) * 2**20
    affordable = max(1, min(preferred, memory_budget) // (n * entries * (t + features) * item))
    several, width = max(1, affordable // channels), min(affordable, channels)
    for group in range(0, groups, several):
        some = slice(group, group + several)
        for first in range(0, channels, width):
            a = patches(image[:, :, some, first : first + width], of, counts)
            h = (g[:, some] @ a.mT).flatten(1)
            k.addmm_(h, h.t())
    return k
