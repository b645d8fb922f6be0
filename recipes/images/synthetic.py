"""Images without a download: smooth patterns, moved about and under noise, that a classifier can also memorize."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CLASSES = 10
_PATTERNS = 4  # a class
_COARSE = 4  # cells a side of a pattern, before it is made smooth
_SHIFT = 0.25  # of the side, in each direction
_NOISE = 2.0  # deviations of a pattern


def generate(size: int, image_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return pixels `[size, 3, image_size, image_size]` and labels `[size]`; all seeds have the same patterns."""
    fixed = torch.Generator().manual_seed(0)
    coarse = torch.randn(CLASSES * _PATTERNS, 3, _COARSE, _COARSE, generator=fixed)
    patterns = F.interpolate(coarse, size=image_size, mode="bilinear", align_corners=False)
    patterns = patterns / patterns.std(dim=(1, 2, 3), keepdim=True)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(patterns), (size,), generator=generator)
    reach = int(_SHIFT * image_size)
    down, right = torch.randint(-reach, reach + 1, (2, size, 1), generator=generator)
    side = torch.arange(image_size)
    rows, columns = (side + down) % image_size, (side + right) % image_size
    # Both indices broadcast to [size, image_size, image_size], which puts the channels last.
    pixels = patterns[chosen[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    noise = torch.randn(pixels.shape, generator=generator)
    return pixels + _NOISE * noise, chosen % CLASSES
