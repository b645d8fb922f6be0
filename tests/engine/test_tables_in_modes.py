"""The language model of `test_tables` under the compiler, checkpointing and interruption."""

import copy
import gc
import weakref
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hf_fngd import FNGD
from hf_fngd.engine.reasons import ON_TOP_OF_ANOTHER
from hf_fngd.layers.embedding import A_TABLE
from hf_fngd.weights.clipped import ClippedSharing, ClippedWeights
from tests.engine.language import (
    LENGTH,
    POSITIONS,
    TABLE,
    LanguageModel,
    attach,
    batch,
    check,
    losses,
    model,
    plain,
    reasons,
    step,
)
from tests.steps import assert_equal

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class InPlace(LanguageModel):
    """Changes the outputs of its tables in place."""

    def embed(self, x: Tensor) -> Tensor:
        y = self.tokens(x)
        y *= 2
        y += self.positions(torch.arange(LENGTH)[None])
        return F.dropout(y, 0.0, inplace=True)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own
def test_outputs_may_be_changed_in_place_and_a_compiled_model_has_the_same_gradients() -> None:
    """But for its table of positions, which stays plain in a graph."""
    found = []
    for cls, compiles in ((LanguageModel, False), (InPlace, False), (InPlace, True)):
        net = model(cls)
        if cls is LanguageModel:
            net.embed = lambda x, net=net: 2 * net.tokens(x) + net.positions(torch.arange(LENGTH)[None])
        preconditioner = attach(net)
        called = torch.compile(net, backend="aot_eager", fullgraph=True) if compiles else net
        found.append([step(called, preconditioner, batch(6, seed)) for seed in (1, 2, 3)][-1])
        assert TABLE in preconditioner.coverage().weighed
    assert reasons(preconditioner, POSITIONS) == A_TABLE
    check(found[1], found[0])
    check(found[2], plain(net, batch(6, 3)), POSITIONS)
    check(found[2], found[0], *(name for name in found[0] if name != POSITIONS))


def test_reentrant_checkpointing_of_several_batches_at_once_is_plain() -> None:
    class Whole(LanguageModel):
        def forward(self, x: Tensor) -> Tensor:
            mark = torch.zeros((), requires_grad=True)  # reentrant checkpointing wants an input with a gradient
            y = checkpoint(lambda mark: self.embed(x) + mark, mark, use_reentrant=True)
            return self.logits(self.body(y))

    net = model(Whole, tied=False)
    preconditioner = attach(net)
    step(net, preconditioner, batch(6))
    parts = batch(12, seed=2).split(6)
    first, second = (losses(net, part).sum() for part in parts)
    first.backward()
    second.backward()
    assert ON_TOP_OF_ANOTHER in reasons(preconditioner)


class Followed(ClippedSharing):
    """Knows whether its last micro-batch but one still exists."""

    batches: ClassVar[list[weakref.ref[Any]]] = []

    def begin(self, size: int, offset: int) -> ClippedWeights:
        made = super().begin(size, offset)
        self.batches.append(weakref.ref(made))
        return made


def test_a_loss_that_is_kept_does_not_keep_the_batch() -> None:
    net = model()
    preconditioner = attach(net, sharing=Followed())
    step(net, preconditioner, batch(6))
    total = losses(net, batch(6, seed=2)).sum()
    total.backward(retain_graph=True)
    preconditioner.step()
    step(net, preconditioner, batch(6, seed=3))
    gc.collect()
    assert [reference() for reference in Followed.batches] == [None, None, None]


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_an_interrupted_run_goes_on_as_it_would_have(stop: int) -> None:
    nets = [model(), model(), model()]
    whole, first, resumed = (FNGD(net) for net in nets)

    def train(net: nn.Module, optimizer: FNGD, *seeds: int) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            losses(net, batch(6, seed)).sum().backward()
            optimizer.step()

    train(nets[0], whole, *range(6))
    train(nets[1], first, *range(stop))
    nets[2].load_state_dict(nets[1].state_dict())
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    assert resumed.coverage().weighed == first.coverage().weighed
    train(nets[2], resumed, *range(stop, 6))
    assert_equal(nets[0], nets[2])
