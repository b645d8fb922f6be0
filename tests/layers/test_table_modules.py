"""Modules with parameters ``[1, T, d]`` of their own: what their forward does beside its output, and who is weighed."""

import copy

import pytest
import torch
from torch import Tensor, nn

from hf_fngd import FNGD


class Around(nn.Module):
    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.before, self.table, self.after = nn.Linear(6, 6), table, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.table(self.before(x)))  # type: ignore[no-any-return]


class Quantizer(nn.Module):
    """A codebook that counts its calls, and keeps a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.codes, self.calls = nn.Parameter(torch.randn(1, 8, 6)), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        codes = self.codes.expand(len(x), -1, -1)
        q = torch.gather(codes, 1, torch.cdist(x, codes).argmin(-1, keepdim=True).expand(-1, -1, 6))
        self.loss = (q - x.detach()).square().mean() + (x - q.detach()).square().mean()
        return x + (q - x).detach()


def test_what_a_forward_sets_is_set_in_the_module() -> None:
    torch.manual_seed(0)
    model = Around(Quantizer())
    plain, optimizer, x = copy.deepcopy(model), FNGD(model, sharing="uniform"), torch.randn(5, 4, 6)
    for _ in range(2):
        optimizer.zero_grad()
        for net in (model, plain):
            (net(x).square().mean() + net.table.loss).backward()
        torch.testing.assert_close(model.before.weight.grad, plain.before.weight.grad)
        torch.testing.assert_close(model.table.codes.grad, plain.table.codes.grad)
        plain.zero_grad()
    assert model.table.calls == plain.table.calls == 2


class Normed(nn.Module):
    """A block with a batch norm and a scale of its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scale = nn.BatchNorm1d(4), nn.Parameter(torch.ones(1, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.norm(x)


def test_the_trial_of_a_module_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model = Around(Normed())
    plain, optimizer, x = copy.deepcopy(model), FNGD(model), torch.randn(6, 4, 6)
    outputs = [net(x) for net in (model, plain)]
    torch.testing.assert_close(outputs[0], outputs[1])
    assert model.table.norm.num_batches_tracked == 1
    torch.testing.assert_close(model.table.norm.running_mean, plain.table.norm.running_mean)
    outputs[0].sum().backward()
    optimizer.step()
    assert "table.scale" in optimizer.coverage().weighed


class OfAMethod(nn.Module):
    """As transformers' Dinov2: a method reads the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 4, 6))

    def encoding(self) -> Tensor:
        return self.positions

    def forward(self, x: Tensor) -> Tensor:
        return x + self.encoding()


class OfTheFirst(OfAMethod):
    """Takes the parameter apart, so that all samples have the row of the first."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.positions[0]


def share_of_the_plain(table: nn.Module) -> tuple[float, FNGD]:
    torch.manual_seed(0)
    model = Around(table)
    plain, optimizer, x = copy.deepcopy(model), FNGD(model), torch.randn(8, 4, 6)
    factors = torch.tensor([1000.0, *[1.0] * 7])[:, None, None]
    for net in (model, plain):
        (net(x).square() * factors).mean().backward()
    share = model.table.positions.grad.norm() / plain.table.positions.grad.norm()
    optimizer.step()
    return float(share), optimizer


def test_parameters_that_a_method_reads_are_weighed() -> None:
    share, optimizer = share_of_the_plain(OfAMethod())
    assert share < 0.3
    assert "table.positions" in optimizer.coverage().weighed


def test_parameters_of_which_one_row_serves_all_samples_are_plain() -> None:
    share, optimizer = share_of_the_plain(OfTheFirst())
    assert share == 1
    assert "table.positions" in optimizer.coverage().plain


class Unfit(OfAMethod):
    """Computes something else on one row a sample."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.positions / self.positions.norm()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler looks at all of them
def test_a_module_that_is_compiled_by_itself_computes_what_it_should() -> None:
    torch.manual_seed(0)
    model = Around(Unfit())
    optimizer, x = FNGD(model), torch.randn(8, 4, 6)
    model.table.compile(backend="eager")
    for _ in range(2):
        found = model.train()(x)
        torch.testing.assert_close(found, model.eval()(x))
        optimizer.zero_grad()
        found.sum().backward()
        optimizer.step()


class OnlyInTraining(OfAMethod):
    """Refuses to run in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            raise RuntimeError("for training alone")
        return x + self.positions


def test_a_trial_that_fails_leaves_the_module_plain() -> None:
    share, optimizer = share_of_the_plain(OnlyInTraining())
    assert share == 1
    assert "table.positions" in optimizer.coverage().plain
