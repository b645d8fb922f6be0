"""Embeddings, tied heads and tables of positions: when their samples are weighed, and when they stay plain."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hf_fngd import FNGD, detach
from hf_fngd.engine.layer import ON_TOP_OF_ANOTHER, USED_ELSEWHERE
from hf_fngd.layers.base import AMBIGUOUS, NOT_THE_BATCH
from hf_fngd.layers.embedding import A_TABLE
from hf_fngd.weights.clipped import ClippedSharing, ClippedWeights
from tests.engine.language import (
    LEFT_OUT,
    LENGTH,
    POSITIONS,
    TABLE,
    VOCABULARY,
    WIDTH,
    LanguageModel,
    after_a_step,
    attach,
    batch,
    check,
    clipped,
    gradients,
    losses,
    model,
    plain,
    reasons,
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Weighted sums ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_tables_and_heads_are_clipped_by_their_own_norms(tied: bool) -> None:
    net = model(tied=tied)
    preconditioner = after_a_step(net)
    for samples in (6, 4):
        x = batch(samples, seed=samples)
        net.zero_grad()
        losses(net, x).sum().backward()
        found = gradients(net)
        check(found, clipped(net, x, "fc", "norm", "tokens", "positions", "head"))
        check(found, plain(net, x), *LEFT_OUT)
        assert float(found[TABLE].norm() / plain(net, x)[TABLE].norm()) < 0.5  # the outlier is small there too
        preconditioner.step()
    weighed = {TABLE, POSITIONS, "norm.weight", "norm.bias"} | ({"head.weight"} if tied else set())
    assert set(preconditioner.coverage().weighed) == weighed


def test_a_table_of_positions_is_expanded_from_the_second_forward_pass_on() -> None:
    net = model()
    preconditioner = attach(net)
    for number in range(3):
        x = batch(6, seed=number)
        net.zero_grad()
        losses(net, x).sum().backward()
        check(gradients(net), clipped(net, x, "positions") if number else plain(net, x), POSITIONS)
        assert POSITIONS in preconditioner.coverage().weighed
        preconditioner.step()
    losses(net, batch(1)).sum().backward()  # a single sample is all of its batch
    preconditioner.step()
    assert POSITIONS in preconditioner.coverage().weighed


class Flat(LanguageModel):
    """Its positions have no batch dimension."""

    def embed(self, x: Tensor) -> Tensor:
        return self.tokens(x) + self.positions(torch.arange(LENGTH))


class Scaling(LanguageModel):
    """A table of positions that is not added."""

    def embed(self, x: Tensor) -> Tensor:
        return self.tokens(x) * self.positions(torch.arange(LENGTH)[None])


class Both(LanguageModel):
    """One that is added, and read by something else as well."""

    def embed(self, x: Tensor) -> Tensor:
        positions = self.positions(torch.arange(LENGTH)[None])
        return self.tokens(x) + positions + torch.tanh(positions)


@pytest.mark.parametrize("cls", [Flat, Scaling, Both])
def test_a_table_that_is_not_added_to_the_batch_stays_plain(cls: type[LanguageModel]) -> None:
    net = model(cls=cls)
    preconditioner = attach(net)
    for seed in range(2):
        x = batch(6, seed)
        net.zero_grad()
        losses(net, x).sum().backward()
        check(gradients(net), plain(net, x), POSITIONS)
        preconditioner.step()
    assert reasons(preconditioner, POSITIONS) == A_TABLE


@pytest.mark.parametrize("sharing", ["never", "replay"])
def test_without_a_gram_matrix_they_stay_plain(sharing: str) -> None:
    net = model()
    preconditioner = after_a_step(net, sharing=sharing)
    preconditioner.end_epoch()
    x = batch(6, seed=2)
    losses(net, x).sum().backward()
    check(gradients(net), plain(net, x), TABLE, POSITIONS, "norm.weight", "norm.bias")
    assert preconditioner.coverage().weighed == ()
    assert TABLE in preconditioner.coverage().plain


def test_equal_weights_change_nothing() -> None:
    found = []
    for layer_types in (None, ["linear"]):
        net = model()
        after_a_step(net, sharing="uniform", layer_types=layer_types)
        losses(net, batch(6, seed=2)).sum().backward()
        found.append(gradients(net))
    check(*found)


# What stays plain ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("excluded", [["tokens"], ["head"]])
def test_an_excluded_module_takes_those_that_share_its_weight_along(excluded: list[str]) -> None:
    net, x = model(), batch(6, seed=2)
    preconditioner = after_a_step(net, exclude_modules=["left_out", *excluded])
    losses(net, x).sum().backward()
    check(gradients(net), plain(net, x), TABLE)
    assert set(preconditioner.coverage().weighed) == {POSITIONS, "norm.weight", "norm.bias"}


class UsesTheTable(LanguageModel):
    def logits(self, y: Tensor) -> Tensor:
        return F.linear(y, self.tokens.weight)


class CallsTheHeadOnSomeTokens(LanguageModel):
    def logits(self, y: Tensor) -> Tensor:
        return self.head(y[:, 1:].flatten(0, 1)).view(len(y), LENGTH - 1, -1)[:, [0, 0, 1]]


class TimeFirst(LanguageModel):
    def embed(self, x: Tensor) -> Tensor:
        return super().embed(x) + self.tokens(x.t()).transpose(0, 1)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [(UsesTheTable, USED_ELSEWHERE), (CallsTheHeadOnSomeTokens, NOT_THE_BATCH), (TimeFirst, NOT_THE_BATCH)],
)
def test_a_weight_is_plain_in_all_of_its_uses_or_in_none(cls: type[LanguageModel], reason: str) -> None:
    net = model(cls=cls)
    preconditioner = after_a_step(net)
    assert reasons(preconditioner) == reason
    for samples in (6, 4, LENGTH):  # as many samples as positions, too
        net.zero_grad()
        x = batch(samples, seed=2)
        losses(net, x).sum().backward()
        check(gradients(net), plain(net, x), TABLE)


def test_a_table_that_is_called_twice_is_clipped_call_by_call() -> None:
    class Again(LanguageModel):
        def embed(self, x: Tensor) -> Tensor:
            return super().embed(x) + self.tokens(x.flip(1)) / 10

    net = model(cls=Again)
    after_a_step(net)
    x = batch(6, seed=2)
    losses(net, x).sum().backward()
    check(gradients(net), clipped(net, x, "tokens", "head"))


class Relative(LanguageModel):
    """A table that pairs of positions look up, as T5's."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.Embedding(LENGTH, WIDTH)

    def embed(self, x: Tensor) -> Tensor:
        place = torch.arange(LENGTH)
        return super().embed(x) + self.pairs((place[:, None] - place).abs()).sum(1)


def test_a_table_of_pairs_is_none_of_samples() -> None:
    net = model(cls=Relative)
    preconditioner = attach(net)
    for samples, reason in ((LENGTH, AMBIGUOUS), (LENGTH, AMBIGUOUS), (5, NOT_THE_BATCH)):
        net.zero_grad()
        x = batch(samples, seed=2)
        losses(net, x).sum().backward()
        check(gradients(net), plain(net, x), "pairs.weight")
        assert reasons(preconditioner, "pairs.weight") == reason
        preconditioner.step()


class Twice(LanguageModel):
    """Another table of the same weight is called with another length."""

    def __init__(self) -> None:
        super().__init__()
        self.sources = nn.Embedding(VOCABULARY, WIDTH)
        self.sources.weight = self.tokens.weight

    def embed(self, x: Tensor) -> Tensor:
        return super().embed(x) + self.sources(torch.cat([x, x], dim=1)).mean(1, keepdim=True)


@pytest.mark.parametrize("cls", [LanguageModel, Twice])
def test_a_batch_with_as_many_positions_as_samples_waits_for_one_that_tells_of_every_use(
    cls: type[LanguageModel],
) -> None:
    net, told = model(cls=cls), False
    preconditioner = attach(net)
    for samples in (LENGTH, LENGTH, 4, LENGTH):
        told = told or samples != LENGTH
        net.zero_grad()
        x = batch(samples, seed=2)
        losses(net, x).sum().backward()
        assert (TABLE in preconditioner.coverage().weighed) == told
        assert torch.allclose(gradients(net)[TABLE], plain(net, x)[TABLE]) != told
        resumed = attach(model(cls=cls))
        resumed.load_state_dict(preconditioner.state_dict())
        assert resumed.state_dict()["layers"] == preconditioner.state_dict()["layers"]
        assert resumed.coverage() == preconditioner.coverage()
        preconditioner.step()


def test_a_batch_without_samples_tells_nothing() -> None:
    net = model()
    preconditioner = attach(net)
    for samples in (4, 0, 5):
        net(batch(samples)).sum().backward()
        preconditioner.step()
    assert TABLE in preconditioner.coverage().weighed


def test_outside_of_the_models_forward_the_samples_are_not_known() -> None:
    net = model()
    preconditioner = after_a_step(net)
    x = batch(6, seed=2)
    (losses(net, x).sum() + 0 * net.tokens(x).sum()).backward()
    net.zero_grad()
    losses(net, x).sum().backward()
    check(gradients(net), plain(net, x), TABLE)
    assert reasons(preconditioner) == USED_ELSEWHERE


class Keyword(nn.Embedding):
    """Takes its input by one of two names."""

    def forward(self, ids: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        return 3 * super().forward(places if ids is None else ids)


class Normed(nn.Embedding):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(super().forward(ids))


class Double(nn.Embedding):
    def forward(self, ids: Tensor) -> Any:
        return super().forward(ids), None


class OtherTable(LanguageModel):
    table: ClassVar[type[nn.Embedding]]

    def __init__(self) -> None:
        super().__init__(tied=False)
        self.tokens = self.table(VOCABULARY, WIDTH)

    def embed(self, x: Tensor) -> Tensor:
        found = self.tokens(places=x) if self.table is Keyword else self.tokens(x)
        return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize(("table", "weighed"), [(Keyword, True), (Normed, False), (Double, False)])
def test_embeddings_of_other_kinds(table: type[nn.Embedding], weighed: bool) -> None:
    net = model(cls=type("With" + table.__name__, (OtherTable,), {"table": table}))
    x = batch(6, seed=2)
    own = copy.deepcopy(net)(x)
    after_a_step(net)
    assert torch.equal(net(x), own)
    losses(net, x).sum().backward()
    check(gradients(net), clipped(net, x, "tokens") if weighed else plain(net, x), TABLE)


def test_a_forward_on_the_instance_is_left_alone() -> None:
    net = model(tied=False)
    own = net.tokens.forward
    net.tokens.forward = lambda ids: own(ids)
    assert TABLE not in attach(net).coverage().weighed


class InPlace(LanguageModel):
    """Changes the outputs of its tables in place."""

    def embed(self, x: Tensor) -> Tensor:
        y = self.tokens(x)
        y *= 2
        y += self.positions(torch.arange(LENGTH)[None])
        return F.dropout(y, 0.0, inplace=True)


def test_outputs_may_be_changed_in_place() -> None:
    found = []
    for cls in (InPlace, LanguageModel):
        net = model(cls=cls)
        if cls is LanguageModel:
            net.embed = lambda x, net=net: 2 * net.tokens(x) + net.positions(torch.arange(LENGTH)[None])
        after_a_step(net)
        losses(net, batch(6, seed=2)).sum().backward()
        found.append(gradients(net))
    check(*found)


# In other modes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_makes_no_difference(reentrant: bool) -> None:
    found = []
    for checkpointing in (None, reentrant):
        net = model(checkpointing=checkpointing)
        after_a_step(net)
        losses(net, batch(6, seed=2)).sum().backward()
        found.append(gradients(net))
    check(*found)


def test_reentrant_checkpointing_of_several_batches_at_once_is_plain() -> None:
    class Whole(LanguageModel):
        def forward(self, x: Tensor) -> Tensor:
            mark = torch.zeros((), requires_grad=True)  # reentrant checkpointing wants an input with a gradient
            y = checkpoint(lambda mark: self.embed(x) + mark, mark, use_reentrant=True)
            return self.logits(self.body(y))

    net = model(cls=Whole, tied=False)
    preconditioner = after_a_step(net)
    parts = batch(12, seed=2).split(6)
    first, second = (losses(net, part).sum() for part in parts)
    first.backward()
    second.backward()
    assert ON_TOP_OF_ANOTHER in reasons(preconditioner)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own
def test_a_compiled_model_has_the_same_gradients() -> None:
    """But for its table of positions, which stays plain in a graph."""
    found = []
    for compiles in (False, True):
        net = model(cls=InPlace)
        preconditioner = attach(net)
        called = torch.compile(net, backend="aot_eager", fullgraph=True) if compiles else net
        for seed in (1, 2, 3):
            net.zero_grad()
            losses(called, batch(6, seed)).sum().backward()
            preconditioner.step()
        found.append(gradients(net))
        assert TABLE in preconditioner.coverage().weighed
    assert reasons(preconditioner, POSITIONS) == A_TABLE
    check(found[1], plain(net, batch(6, 3)), POSITIONS)
    check(found[1], found[0], *(name for name in found[0] if name != POSITIONS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_forward_is_the_models_own(dtype: torch.dtype) -> None:
    net, x = model(torch.float32), batch(6, seed=2)
    own = copy.deepcopy(net)
    after_a_step(net)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        found, expected = net(x), own(x)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    found.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())


def test_evaluation_passes_it_by() -> None:
    net, x = model(), batch(6)
    after_a_step(net)
    with torch.no_grad():
        assert net(x).grad_fn is None
    net.eval()
    losses(net, x).sum().backward()
    check(gradients(net), plain(net, x))


def test_detaching_gives_back_the_model() -> None:
    net = model()
    after_a_step(net)
    assert type(copy.deepcopy(net.tokens)) is nn.Embedding
    detach(net)
    assert (type(net.tokens), type(net.head), type(net.norm)) == (nn.Embedding, nn.Linear, nn.LayerNorm)
    x = batch(6, seed=2)
    losses(net, x).sum().backward()
    check(gradients(net), plain(net, x))


class Followed(ClippedSharing):
    """Knows whether its last micro-batch but one still exists."""

    batches: ClassVar[list[weakref.ref[Any]]] = []

    def begin(self, size: int, offset: int) -> ClippedWeights:
        made = super().begin(size, offset)
        self.batches.append(weakref.ref(made))
        return made


def test_a_loss_that_is_kept_does_not_keep_the_batch() -> None:
    net = model()
    preconditioner = after_a_step(net, sharing=Followed())
    total = losses(net, batch(6, seed=2)).sum()
    total.backward(retain_graph=True)
    preconditioner.step()
    losses(net, batch(6, seed=3)).sum().backward()  # the last one is kept
    gc.collect()
    assert [reference() is None for reference in Followed.batches] == [True, True, False]


def test_an_interrupted_run_goes_on_as_it_would_have() -> None:
    def made() -> tuple[nn.Module, FNGD]:
        net = model()
        return net, FNGD(net)

    def train(net: nn.Module, optimizer: FNGD, seeds: range) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            losses(net, batch(6, seed)).sum().backward()
            optimizer.step()

    for stop in (0, 1, 3):
        whole, optimizer = made()
        train(whole, optimizer, range(6))
        first, optimizer = made()
        train(first, optimizer, range(stop))
        second, resumed = made()
        second.load_state_dict(first.state_dict())
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert resumed.coverage().weighed == optimizer.coverage().weighed
        train(second, resumed, range(stop, 6))
        for name, parameter in whole.named_parameters():
            assert torch.equal(parameter, second.get_parameter(name)), name
