"""Inputs and output gradients of a layer, of any shape, dtype and likeness of the samples, for hypothesis."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

sizes = st.integers(1, 7)
dampings = st.floats(-4, 3).map(lambda exponent: 10.0**exponent)
seeds = st.integers(0, 2**32)
budgets = st.integers(1, 4000) | st.just(2**28)


@dataclass(frozen=True)
class Layer:
    """Inputs ``[N, T, i]`` and output gradients ``[N, T, o]`` of one layer, exact in their dtype."""

    a: Tensor
    g: Tensor

    def per_sample(self, bias: bool) -> Tensor:
        """U ``[P, N]`` in float64."""
        a, g = self.a.double(), self.g.double()
        columns = []
        for n in range(len(a)):
            h = sum(torch.outer(g[n, t], a[n, t]) for t in range(a.shape[1])).flatten()
            columns.append(len(a) * (torch.cat([h, g[n].sum(dim=0)]) if bias else h))
        return torch.stack(columns, dim=1)


@st.composite
def layers(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Layer:
    """Samples that are independent, have a common part, are duplicates, or have no gradient."""
    n, t, i, o = draw(sizes), draw(sizes), draw(sizes), draw(sizes)
    dtype, generator = draw(st.sampled_from(dtypes)), torch.Generator().manual_seed(draw(seeds))
    likeness = draw(st.sampled_from(["independent", "common", "duplicates", "zeros"]))
    a, g = (torch.randn(n, t, f, generator=generator, dtype=torch.float64) for f in (i, o))
    if likeness == "common":
        a, g = a + 3, g + 3
    elif likeness == "duplicates":
        order = torch.randint((n + 1) // 2, (n,), generator=generator)
        a, g = a[order], g[order]
    elif likeness == "zeros":
        g[: n // 2] = 0
    return Layer(a.to(dtype), (g * 2.0 ** draw(st.integers(-6, 4))).to(dtype))
