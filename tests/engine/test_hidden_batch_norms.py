"""BatchNorms, and layers before them, that the first batch's graph does not show."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_fngd import FNGD, FNGDPreconditioner
from hf_fngd.engine.reasons import CLIPPED_BEHIND
from tests.engine.batch_norms import clipping, images, loss, network


class Skipping(nn.Sequential):
    """Runs its last two layers alone in the first pass."""

    skips = True

    def forward(self, x: Tensor) -> Tensor:
        skips, self.skips = self.skips, False
        if skips:
            return nn.functional.linear(x.flatten(1)[:, :8], self[-1].weight, self[-1].bias)
        return super().forward(x)


class Reentrant(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(super().forward, x.requires_grad_(), use_reentrant=True)
        return y


@pytest.mark.parametrize("cls", [Reentrant, Skipping, nn.Sequential])
def test_batch_norms_that_the_graph_does_not_show_are_told(
    cls: type[nn.Sequential], caplog: pytest.LogCaptureFixture
) -> None:
    model, hidden = network(cls), cls is not nn.Sequential
    optimizer = FNGD(model)
    loss(model(images())).backward()
    assert any(record.levelname == "WARNING" for record in caplog.records) == hidden
    optimizer.step()
    assert ("does not show the BatchNorms 1, 8:" in optimizer.coverage().note) == hidden


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_block_with_or_before_a_batch_norm_is_plain(whole: bool) -> None:
    torch.manual_seed(0)
    body = network()[:2] if whole else network()[:1]
    rest = [] if whole else [nn.BatchNorm2d(8)]
    model = nn.Sequential(body, *rest, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2)).double()
    copied = copy.deepcopy(model)
    optimizer = FNGDPreconditioner(model, strict=True)
    body.compile(backend="aot_eager")
    clipping(copied[-1])
    for seed in range(3):
        for one in (model, copied):
            one.zero_grad()
            loss(one(images(seed))).backward()
        optimizer.step()
        for p, q in zip(model.parameters(), copied.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=0)
    assert optimizer.coverage().plain["0.0.weight"] == CLIPPED_BEHIND


def test_batch_norms_that_are_frozen_or_in_evaluation_mode_are_not_missed() -> None:
    model = network(Reentrant)
    model[1].requires_grad_(False)
    model[8].eval()
    optimizer = FNGD(model)
    loss(model(images())).backward()
    assert "BatchNorms" not in optimizer.coverage().note
