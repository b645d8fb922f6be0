"""Several forward passes of a model or its layers in one step; several optimizers that step by the same gradients."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_fngd import FNGDPreconditioner

WIDTH = 6


class Folded(nn.Module):
    """A model whose layers see samples and positions in one dimension; checkpointed, in regions within a region."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.first, self.second, self.head = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.depth = depth  # of the regions

    def forward(self, x: Tensor) -> Tensor:
        y = self._within(self.depth, x.flatten(0, 1)).view(x.shape)
        return self.head(y)

    def _within(self, depth: int, rows: Tensor) -> Tensor:
        if depth:
            return checkpoint(self._within, depth - 1, rows, use_reentrant=False)
        return torch.tanh(self.second(torch.tanh(self.first(rows))))


def gradients(depth: int, sharing: str, swapped: bool = False) -> list[Tensor]:
    """Of two steps, each of two passes on texts of other lengths and one backward pass."""
    torch.manual_seed(0)
    model = Folded(depth).double()
    preconditioner = FNGDPreconditioner(model, sharing=sharing)
    found = []
    for _ in range(2):
        batches = [torch.randn(4, length, WIDTH, dtype=torch.float64).requires_grad_() for length in (5, 8)]
        values = [model(x).square().mean() for x in batches]
        (values[1] + values[0] if swapped else values[0] + values[1]).backward()
        preconditioner.step()
        found += [p.grad for p in model.parameters() if p.grad is not None]
        model.zero_grad()
    assert len(found) == 12
    assert not preconditioner.coverage().missed
    return found


@pytest.mark.parametrize("sharing", ["clipped", "uniform", "never"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_region_is_recomputed_for_the_pass_that_it_belongs_to(depth: int, sharing: str) -> None:
    if not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):
        pytest.skip("this torch does not show which region is under way")
    expected = gradients(0, sharing)
    for swapped in (False, True):
        torch.testing.assert_close(gradients(depth, sharing, swapped), expected)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_call_outside_of_the_models_forward_is_plain(checkpointed: bool) -> None:
    torch.manual_seed(0)
    model = Head().double()
    plain = copy.deepcopy(model)
    preconditioner = FNGDPreconditioner(model)
    x, prototypes = torch.randn(2, 5, WIDTH, dtype=torch.float64) * torch.tensor([1, 1, 1, 1, 9.0])[:, None]
    prototypes.requires_grad_()  # as many as samples
    model(x).square().sum().backward()
    weighed = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    output = model(x)
    outside = checkpoint(model.head, prototypes, use_reentrant=False) if checkpointed else model.head(prototypes)
    (output.square().sum() + outside.square().sum()).backward()
    plain.head(prototypes).square().sum().backward()
    preconditioner.step()
    for p, q, own in zip(model.parameters(), plain.parameters(), weighed, strict=True):
        torch.testing.assert_close(p.grad, own if q.grad is None else own + q.grad)
    assert set(preconditioner.coverage().missed) == {"head.weight", "head.bias"}


def test_two_optimizers_may_step_by_the_same_gradients() -> None:
    model = Head()
    preconditioner = FNGDPreconditioner(model, strict=True)
    optimizers = [torch.optim.SGD([p for p in model.parameters() if p.dim() == dim], lr=1e-2) for dim in (1, 2)]
    for optimizer in optimizers:
        preconditioner.follow(optimizer)
    for _ in range(3):
        model(torch.randn(5, WIDTH)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    assert not preconditioner.coverage().missed


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("to_none", [False, True])
def test_a_pass_whose_gradients_are_cleared_is_no_micro_batch(to_none: bool, early: bool) -> None:
    """As a generator's through its discriminator is none of the discriminator's, whenever its gradients are cleared."""
    torch.manual_seed(0)
    model = Head().double()
    alone, scale = copy.deepcopy(model), torch.tensor([1, 1, 1, 1, 9.0], dtype=torch.float64)[:, None]
    preconditioners = [FNGDPreconditioner(model), FNGDPreconditioner(alone)]
    for _ in range(3):
        thrown, x, more = torch.randn(3, 5, WIDTH, dtype=torch.float64) * scale
        (100 * model(thrown)).square().sum().backward()
        if early:
            model.zero_grad(to_none)
        output = model(x)
        if not early:
            model.zero_grad(to_none)
        output.square().sum().backward()
        model(more).square().sum().backward()  # a second micro-batch, which is one
        for one in (x, more):
            alone(one).square().sum().backward()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        for preconditioner in preconditioners:
            preconditioner.step()
        model.zero_grad(to_none)
        alone.zero_grad(to_none)


def test_gradients_that_somebody_changes_between_micro_batches_are_theirs() -> None:
    model = Head()
    preconditioner = FNGDPreconditioner(model)
    for _ in range(3):
        for _ in range(2):
            model(torch.randn(5, WIDTH)).square().sum().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        preconditioner.step()
        assert preconditioner.policy.state_dict()["parts"] == 2
        model.zero_grad(set_to_none=False)


def test_a_backward_pass_of_a_closed_step_may_follow_that_of_a_cleared_one() -> None:
    model = Head()
    preconditioner = FNGDPreconditioner(model)
    late = model(torch.randn(5, WIDTH)).square().sum()
    preconditioner.skip()
    model(torch.randn(5, WIDTH)).square().sum().backward()
    model.zero_grad()
    late.backward()
    assert all(p.grad is not None for p in model.parameters())
    preconditioner.step()


def test_gradients_that_come_anew_without_a_pass_of_the_model_are_told() -> None:
    model = Head()
    preconditioner = FNGDPreconditioner(model)
    model(torch.randn(5, WIDTH)).square().sum().backward()
    preconditioner.step()
    model.head(torch.randn(5, WIDTH)).square().sum().backward()  # on top of the others, which were kept
    preconditioner.step()
    assert set(preconditioner.coverage().missed) == {"head.weight", "head.bias"}


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(9, WIDTH), nn.Embedding(7, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.tokens(ids) + self.positions(torch.arange(ids.shape[1])[None]))


@pytest.mark.parametrize("first", [1, 4])
def test_a_table_of_positions_is_weighed_whatever_the_first_batch(first: int) -> None:
    model = Positions()
    preconditioner = FNGDPreconditioner(model)
    for size in (first, 4, 4):
        model(torch.randint(9, (size, 7))).square().sum().backward()
        preconditioner.step()
        model.zero_grad()
    assert "positions.weight" in preconditioner.coverage().weighed
