"""Gram matrices by every route, weighted sums, norms, and the exactness of `normalize`."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_fngd.weights.algebra import accumulation_dtype, sample_norms, weighted_bias_sum, weighted_sum
from hf_fngd.weights.gram import Route, cheaper_route, gram, normalize
from tests.reference import gram_from_layer

# N, T, i, o
SHAPES = [(1, 1, 1, 1), (7, 1, 5, 3), (7, 4, 5, 3), (6, 3, 2, 9), (13, 2, 4, 4), (1, 5, 3, 2), (2, 11, 2, 1)]
ROUTES = ["ghost", "formed", None]
BUDGETS = [1, 500, 3000, 2**28]


def layer(n: int, t: int, i: int, o: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + 10 * t + 100 * i + 1000 * o)
    a = torch.randn(n, t, i, generator=generator, dtype=torch.float64)
    g = torch.randn(n, t, o, generator=generator, dtype=torch.float64)
    return a.to(dtype), g.to(dtype)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_route_yields_the_dense_gram(
    shape: tuple[int, ...], route: Route | None, bias: bool, budget: int
) -> None:
    a, g = layer(*shape)
    found = gram(a, g, bias=bias, memory_budget=budget, route=route)
    torch.testing.assert_close(found, gram_from_layer(a, g, bias), rtol=1e-11, atol=1e-11)


class Allocations(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation makes, apart from the given ones."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.inputs = {x.untyped_storage().data_ptr() for x in inputs}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in self.inputs:
            self.largest = max(self.largest, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("budget", [1, 2**12, 2**14, 2**16])
@pytest.mark.parametrize("route", ["ghost", "formed"])
def test_temporary_memory_stays_within_the_budget(route: Route, budget: int) -> None:
    n, t, i, o, item = 8, 4, 12, 16, 8
    a, g = layer(n, t, i, o)
    smallest_block = {"ghost": t * n * t * item, "formed": n * i * item}[route]
    with Allocations(a, g) as allocations:
        gram(a, g, bias=False, memory_budget=budget, route=route)
    # The ghost route holds two products at a time.
    held = 2 if route == "ghost" else 1
    assert held * allocations.largest <= max(budget, held * smallest_block, held * n * n * item)


@pytest.mark.parametrize("route", ["ghost", "formed"])
def test_a_larger_budget_is_used(route: Route) -> None:
    a, g = layer(16, 8, 4, 128)
    sizes = []
    for budget in (1, 2**15, 2**20):
        with Allocations(a, g) as allocations:
            gram(a, g, bias=False, memory_budget=budget, route=route)
        sizes.append(allocations.largest)
    assert sizes[0] < sizes[1] < sizes[2]


def test_on_a_cpu_h_is_formed_in_slices_even_where_the_budget_does_not_ask_for_it() -> None:
    a, g = layer(8, 1, 128, 512)
    with Allocations(a, g) as allocations:
        found = gram(a, g, bias=True, memory_budget=2**28, route="formed")
    assert allocations.largest <= 2**21 < 8 * 128 * 512 * 8
    torch.testing.assert_close(found, gram(a, g, bias=True, memory_budget=2**28, route="ghost"))


@pytest.mark.parametrize(("n", "t"), [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("route", ROUTES)
def test_an_empty_batch_has_an_empty_or_zero_gram(n: int, t: int, route: Route | None) -> None:
    k = gram(torch.zeros(n, t, 2), torch.zeros(n, t, 3), bias=True, memory_budget=1, route=route)
    assert torch.equal(k, torch.zeros(n, n))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_gram_is_formed_in_float32_or_better(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert accumulation_dtype(dtype) == expected
    a, g = layer(5, 3, 4, 2, dtype)
    k = gram(a, g, bias=True, memory_budget=2**20)
    assert k.dtype == expected
    torch.testing.assert_close(k.double(), gram_from_layer(a.double(), g.double(), True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("n", "t", "i", "o", "route"),
    [
        # Measured crossings on a CPU (N = 64): T near 18, 27 and 36.
        (64, 10, 256, 256, "ghost"),
        (64, 30, 256, 256, "formed"),
        (64, 20, 512, 512, "ghost"),
        (64, 40, 512, 512, "formed"),
        (64, 25, 512, 2048, "ghost"),
        (64, 60, 512, 2048, "formed"),
        (64, 1, 4, 4, "ghost"),
        (64, 200, 4, 4, "formed"),
    ],
)
def test_the_cheaper_route_is_the_one_measured(n: int, t: int, i: int, o: int, route: str) -> None:
    assert cheaper_route(n, t, i, o) == route


@pytest.mark.parametrize("shape", SHAPES)
def test_weighted_sum_is_the_sum_of_weighted_samples(shape: tuple[int, ...]) -> None:
    a, g = layer(*shape)
    w = torch.linspace(-0.5, 2, shape[0], dtype=torch.float64)
    h = [sum(torch.outer(g[n, t], a[n, t]) for t in range(shape[1])) for n in range(shape[0])]
    torch.testing.assert_close(weighted_sum(a, g, w), sum(w[n] * h[n] for n in range(shape[0])))
    torch.testing.assert_close(weighted_sum(a, g, None), sum(h))
    torch.testing.assert_close(weighted_bias_sum(g, w), sum(w[n] * g[n].sum(0) for n in range(shape[0])))
    torch.testing.assert_close(weighted_bias_sum(g, None), g.sum((0, 1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weighted_sums_keep_their_dtype(dtype: torch.dtype) -> None:
    a, g = layer(4, 2, 3, 5, dtype)
    w = torch.ones(4)
    assert weighted_sum(a, g, w).dtype == dtype
    assert weighted_bias_sum(g, w).dtype == dtype


def norms_of_h(a: Tensor, g: Tensor, bias: bool) -> Tensor:
    if bias:
        a = torch.cat([a, torch.ones_like(a[..., :1])], dim=-1)
    return torch.linalg.matrix_norm(g.transpose(1, 2) @ a)


@pytest.mark.parametrize("bias", [True, False])
def test_sample_norms_are_those_of_h_for_single_positions(bias: bool) -> None:
    a, g = layer(6, 1, 4, 3)
    torch.testing.assert_close(sample_norms(a, g, bias=bias), norms_of_h(a, g, bias))


@pytest.mark.parametrize("bias", [True, False])
def test_sample_norms_bound_those_of_h_for_many_positions(bias: bool) -> None:
    a, g = layer(6, 5, 4, 3)
    assert (sample_norms(a, g, bias=bias) >= norms_of_h(a, g, bias)).all()


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        *((torch.float32, scale) for scale in (1e-45, 1e-38, 1e-20, 1.0, 1e20, 3e38)),
        *((torch.float64, scale) for scale in (1e-310, 1e-200, 1e-20, 1.0, 1e20, 1e300)),
        *((torch.float16, scale) for scale in (6e-8, 1.0, 6e4)),
    ],
)
def test_normalize_divides_by_an_exact_power_of_two(dtype: torch.dtype, scale: float) -> None:
    x = torch.tensor([scale, -scale / 3, scale / 7, 0.0], dtype=torch.float64).to(dtype)
    y = normalize(x)
    assert y.dtype == accumulation_dtype(dtype)
    assert 0.5 <= float(y.abs().max()) < 1
    ratios = {float(top) / float(bottom) for top, bottom in zip(y, x.to(y.dtype), strict=True) if bottom != 0}
    assert len(ratios) == 1 or dtype == torch.float64  # a ratio beyond float64's range comes out as infinity
    mantissas = torch.frexp(y)[0], torch.frexp(x.to(y.dtype))[0]
    assert torch.equal(*mantissas)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_normalize_does_not_hide_what_is_not_finite(value: float) -> None:
    assert not torch.isfinite(normalize(torch.tensor([1.0, value]))).all()


def test_normalize_keeps_zeros_and_nothing() -> None:
    assert torch.equal(normalize(torch.zeros(3)), torch.zeros(3))
    assert normalize(torch.zeros(0, 3)).shape == (0, 3)
