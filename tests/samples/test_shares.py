"""Samples whose rows are folded behind each other: believed as long as each has its share of them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fngd import FNGDPreconditioner
from hf_fngd.samples.inputs import sizes_of
from hf_fngd.samples.rows import Shares
from tests.nets import settings_of
from tests.samples.orders import WIDTH, batch, build, expected


class PaddingFree(nn.Module):
    """Its middle layer sees the tokens that the mask has, and no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(WIDTH, 5), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.fc1(x).tanh()
        padded = y.new_zeros(*mask.shape, 4)
        padded[mask] = self.fc2(y[mask]).tanh()
        return self.fc3(padded.sum(1))


def step(model: nn.Module, optimizer: FNGDPreconditioner, lengths: list[int], longest: int) -> Tensor:
    """The gradient of a step, of the middle layer."""
    generator = torch.Generator().manual_seed(sum(lengths))
    x = torch.randn(len(lengths), longest, WIDTH, generator=generator, dtype=torch.float64)
    x[0] *= 20  # which is clipped
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    y = torch.arange(len(lengths)) % 3
    model.zero_grad()
    F.cross_entropy(model(x, mask), y).backward()
    optimizer.step()
    gradient = model.get_parameter("fc2.weight").grad
    assert gradient is not None
    return gradient.clone()


@pytest.mark.parametrize(
    ("lengths", "longest"),
    [([2, 6, 4], 6), ([6, 4, 2], 7), ([3, 2, 2], 3), ([3, 6, 6], 6), ([4, 4, 4], 6), ([1, 5, 6], 8)],
)
def test_tokens_without_their_padding_are_no_equal_shares(lengths: list[int], longest: int) -> None:
    """Four tokens a sample at first, or as many as N divides later: no token gets another sample's weight."""
    torch.manual_seed(0)
    model = PaddingFree().double()
    plain = copy.deepcopy(model)
    preconditioner = FNGDPreconditioner(model)
    alone = FNGDPreconditioner(plain, exclude_modules=["fc2"])
    assert not torch.equal(step(model, preconditioner, [4, 4, 4], 4), step(plain, alone, [4, 4, 4], 4))
    assert preconditioner.coverage().missed == {}
    for _ in range(2):  # nor is it believed once more
        torch.testing.assert_close(
            step(model, preconditioner, lengths, longest), step(plain, alone, lengths, longest), rtol=1e-12, atol=0
        )
    assert "drops padding inside" in preconditioner.coverage().missed["fc2.weight"]
    assert preconditioner.coverage().missed.keys() == {"fc2.weight", "fc2.bias"}
    full = step(model, preconditioner, [4, 4, 4], 4)
    torch.testing.assert_close(full, step(plain, alone, [4, 4, 4], 4), rtol=1e-12, atol=0)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("order", ["folded, samples first", "folded, positions first"])
def test_folded_samples_may_be_of_any_length(order: str, compiled: bool) -> None:
    model = build(order)
    plain = copy.deepcopy(model)
    preconditioner = FNGDPreconditioner(model, **settings_of("clipped"))
    called = torch.compile(model, backend="aot_eager") if compiled else model
    for sizes in [(6, 6), (3, 4), (6, 9), (4, 1), (5, 6)]:
        x, y = batch(*sizes, order)
        x[0] *= 20
        model.zero_grad()
        F.cross_entropy(called(x), y).backward()
        preconditioner.step()
        for name, g in expected(plain, x, y, "clipped", 0, ["fc1", "fc2", "fc3", "norm"]).items():
            torch.testing.assert_close(model.get_parameter(name).grad, g, rtol=1e-7, atol=1e-10, msg=name)
    assert preconditioner.coverage().missed == {}


def test_a_share_is_that_of_an_input_or_constant_or_grows() -> None:
    images, texts = torch.zeros(4, 3, 8, 6), torch.zeros(4, 10)
    sizes = sizes_of(((images,), {"batch": {"input_ids": texts, "other": torch.zeros(5)}}), 4, 0)
    assert sizes == {".0.0": {3, 24, 144}, ".1.batch.input_ids": {10}}
    assert sizes_of(torch.zeros(7, 4, 2), 4, 1) == {"": {7, 14}}
    tokens, windows = Shares(frozenset([10]), sizes), Shares(frozenset([12]), sizes)
    larger = {".0.0": frozenset({3, 48, 288}), ".1.batch.input_ids": frozenset([13])}
    assert [rows for rows in range(1, 40) if tokens.allow(rows, larger)] == [13]
    assert [rows for rows in range(1, 40) if windows.allow(rows, larger)] == [12, 24]


def test_a_resumed_run_knows_that_the_shares_are_unequal() -> None:
    torch.manual_seed(0)
    model = PaddingFree().double()
    preconditioner = FNGDPreconditioner(model)
    step(model, preconditioner, [4, 4, 4], 4)
    step(model, preconditioner, [2, 6, 4], 6)
    other = copy.deepcopy(model)
    resumed = FNGDPreconditioner(other)
    resumed.load_state_dict(preconditioner.state_dict())
    for lengths, longest in (([4, 4, 4], 4), ([3, 6, 6], 6)):
        torch.testing.assert_close(
            step(other, resumed, lengths, longest), step(model, preconditioner, lengths, longest)
        )
