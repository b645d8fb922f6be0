"""Embeddings and tied heads that keep their plain gradients, and those that tell late."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_fngd import detach
from hf_fngd.backward import AMBIGUOUS, NOT_THE_BATCH, USED_ELSEWHERE, MicroBatch
from hf_fngd.rest import A_TABLE
from hf_fngd.sharing import BatchInfo, SharingPolicy
from tests.rest.setting import (
    LENGTH,
    PLAIN,
    TABLE,
    VOCABULARY,
    WIDTH,
    LanguageModel,
    after_a_coefficient_step,
    attach,
    batch,
    check,
    gradients,
    kept,
    losses,
    model,
    reasons,
    weighted,
)

# What stays plain ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sharing", "weigh_rest"), [("last", False), ("never", True), ("sketched", True)])
def test_the_rest_is_plain_without_it_and_where_no_weights_are_kept(sharing: str, weigh_rest: bool) -> None:
    net = model()
    preconditioner = attach(net, sharing, weigh_rest=weigh_rest)
    for seed in (1, 2):
        x = batch(6, seed)
        net.zero_grad()
        losses(net, x).mean().backward()
        preconditioner.step()
    check(gradients(net), weighted(net, x), TABLE, *PLAIN)
    assert preconditioner.coverage().weighed == ()
    assert TABLE in preconditioner.coverage().plain


def test_equal_weights_change_nothing() -> None:
    found = []
    for weigh_rest in (False, True):
        net = model()
        preconditioner = attach(net, "uniform", weigh_rest=weigh_rest)
        for seed in (1, 2):
            net.zero_grad()
            losses(net, batch(6, seed)).mean().backward()
            preconditioner.step()
        found.append(gradients(net))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("excluded", [["tokens"], ["head"]])
def test_an_excluded_module_takes_those_that_share_its_weight_along(excluded: list[str]) -> None:
    net, x = model(), batch(6, seed=2)
    preconditioner = after_a_coefficient_step(net, exclude_modules=["left_out", *excluded])
    losses(net, x).mean().backward()
    check(gradients(net), weighted(net, x), TABLE)
    assert [slot.name for slot in preconditioner.rest] == ["positions"]


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
    preconditioner = after_a_coefficient_step(net)
    assert reasons(preconditioner) == reason
    for samples in (6, 4, LENGTH):  # as many samples as positions, too
        net.zero_grad()
        x = batch(samples, seed=2)
        losses(net, x).mean().backward()
        check(gradients(net), weighted(net, x), TABLE)


def test_tables_of_positions_are_none_of_samples() -> None:
    class Relative(LanguageModel):
        """A table that pairs of positions look up, as T5's."""

        def __init__(self) -> None:
            super().__init__()
            self.pairs = nn.Embedding(LENGTH, WIDTH)

        def embed(self, x: Tensor) -> Tensor:
            place = torch.arange(LENGTH)
            return super().embed(x) + self.pairs((place[:, None] - place).abs()).sum(1)

    net = model(cls=Relative)
    preconditioner = attach(net, "ranked", coefficient_steps=2)
    for samples, reason in ((LENGTH, AMBIGUOUS), (LENGTH, AMBIGUOUS), (5, NOT_THE_BATCH)):
        net.zero_grad()
        x = batch(samples, seed=2)
        losses(net, x).mean().backward()
        check(gradients(net), weighted(net, x), "pairs.weight", "positions.weight")
        assert reasons(preconditioner, "pairs.weight") == reason
        preconditioner.step()
    assert reasons(preconditioner, "positions.weight") == A_TABLE


def test_a_batch_with_as_many_positions_as_samples_waits_for_another() -> None:
    net = model()
    preconditioner = attach(net, "ranked", coefficient_steps=3)
    # Told by the third batch, weights are there for the fourth.
    for samples, told, weighed in (
        (LENGTH, False, False),
        (LENGTH, False, False),
        (4, True, False),
        (LENGTH, True, True),
    ):
        net.zero_grad()
        x = batch(samples, seed=2)
        losses(net, x).mean().backward()
        assert torch.allclose(gradients(net)[TABLE], weighted(net, x)[TABLE]) != weighed
        assert (TABLE in preconditioner.coverage().weighed) == told
        preconditioner.step()


def test_a_table_waits_for_the_last_of_its_uses() -> None:
    """A use of another length is told by a batch that leaves the others ambiguous."""

    class Twice(LanguageModel):
        def __init__(self) -> None:
            super().__init__()
            self.sources = nn.Embedding(VOCABULARY, WIDTH)
            self.sources.weight = self.tokens.weight

        def embed(self, x: Tensor) -> Tensor:
            return super().embed(x) + self.sources(torch.cat([x, x], dim=1)).mean(1, keepdim=True)

    net = model(cls=Twice)
    preconditioner = attach(net, "clipped")
    for samples, weighed in ((LENGTH, False), (LENGTH, False), (4, True), (LENGTH, True)):
        net.zero_grad()
        x = batch(samples, seed=2)
        losses(net, x).mean().backward()
        assert (TABLE in preconditioner.coverage().weighed) == weighed
        resumed = attach(model(cls=Twice), "clipped")
        resumed.load_state_dict(preconditioner.state_dict())
        assert [slot.reasons for slot in resumed.rest] == [slot.reasons for slot in preconditioner.rest]
        assert [slot.batch_first for slot in resumed.rest] == [slot.batch_first for slot in preconditioner.rest]
        if not weighed:
            check(gradients(net), weighted(net, x), TABLE)
        preconditioner.step()


def test_a_batch_without_samples_tells_nothing() -> None:
    net = model()
    preconditioner = attach(net, "clipped")
    for samples in (4, 0, 5):
        losses(net, batch(samples)).sum().backward()
        preconditioner.step()
    assert TABLE in preconditioner.coverage().weighed


def test_outside_of_the_models_forward_nobody_knows_the_samples() -> None:
    net = model()
    preconditioner = after_a_coefficient_step(net)
    x = batch(6, seed=2)
    (losses(net, x).mean() + 0 * net.tokens(x).sum()).backward()
    net.zero_grad()
    losses(net, x).mean().backward()
    check(gradients(net), weighted(net, x), TABLE)
    assert reasons(preconditioner) == USED_ELSEWHERE


class Scaled(nn.Embedding):
    """As BART's and Gemma's."""

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
        super().__init__()
        self.tokens = self.table(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def embed(self, x: Tensor) -> Tensor:
        found = self.tokens(places=x) if self.table is Scaled else self.tokens(x)
        return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize(("table", "weighed"), [(Scaled, True), (Normed, False), (Double, False)])
def test_embeddings_of_other_kinds(table: type[nn.Embedding], weighed: bool) -> None:
    net = model(cls=type("With" + table.__name__, (OtherTable,), {"table": table}))
    x = batch(6, seed=2)
    own = copy.deepcopy(net)(x)
    w = kept(after_a_coefficient_step(net))
    assert torch.equal(net(x), own)
    losses(net, x).mean().backward()
    names = [name for name, _ in net.tokens.named_parameters(prefix="tokens")]
    check(gradients(net), weighted(net, x, w if weighed else None), *names)


def test_a_forward_on_the_instance_is_left_alone() -> None:
    net = model(tied=False)
    own = net.tokens.forward
    net.tokens.forward = lambda ids: own(ids)
    assert [slot.name for slot in attach(net).rest] == ["positions"]


def test_outputs_may_be_changed_in_place() -> None:
    class InPlace(LanguageModel):
        def embed(self, x: Tensor) -> Tensor:
            y = self.tokens(x)
            y *= 2
            y += self.positions(torch.arange(LENGTH))
            return F.dropout(y, 0.0, inplace=True)

    net = model(cls=InPlace)
    w = kept(after_a_coefficient_step(net))
    x = batch(6, seed=2)
    losses(net, x).mean().backward()
    check(gradients(net), weighted(net, x, w), TABLE)
    check(gradients(net), weighted(net, x), *PLAIN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_forward_is_the_models_own(dtype: torch.dtype) -> None:
    net, x = model(torch.float32), batch(6, seed=2)
    plain = copy.deepcopy(net)
    after_a_coefficient_step(net)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        found, own = net(x), plain(x)
    assert found.dtype == own.dtype
    assert torch.equal(found, own)
    found.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())


def test_evaluation_passes_it_by() -> None:
    net, x = model(), batch(6)
    after_a_coefficient_step(net)
    with torch.no_grad():
        assert net(x).grad_fn is None
    net.eval()
    losses(net, x).mean().backward()
    check(gradients(net), weighted(net, x), TABLE)


def test_detaching_gives_back_the_model() -> None:
    net = model()
    after_a_coefficient_step(net)
    assert type(copy.deepcopy(net.tokens)) is nn.Embedding
    detach(net)
    assert type(net.tokens) is nn.Embedding
    assert type(net.head) is nn.Linear
    x = batch(6, seed=2)
    losses(net, x).mean().backward()
    check(gradients(net), weighted(net, x), TABLE)


def test_a_loss_that_is_kept_does_not_keep_the_batch() -> None:
    net = model()
    preconditioner = after_a_coefficient_step(net)
    total = losses(net, batch(6, seed=2)).mean()
    assert isinstance(preconditioner._forwards.batch, MicroBatch)
    reference = weakref.ref(preconditioner._forwards.batch)
    total.backward(retain_graph=True)
    preconditioner.step()
    losses(net, batch(6, seed=3)).mean().backward()  # the last one is kept
    gc.collect()
    assert reference() is None


def test_a_policys_lookup_is_asked_in_shared_steps_alone_unless_it_follows_samples() -> None:
    class Counting(SharingPolicy):
        name: ClassVar[str] = "counting"
        asked = 0

        def lookup(self, batch: BatchInfo) -> Tensor | None:
            self.asked += 1
            return None

        def commit(self, w: Tensor, valid: Tensor, batch: BatchInfo) -> None:
            pass

    for follows, asked in ((False, 1), (True, 3)):
        policy = Counting()
        policy.__class__.follows = follows
        net = model()
        preconditioner = attach(net, policy, coefficient_steps=2)
        for seed in range(3):
            losses(net, batch(6, seed)).mean().backward()
            preconditioner.step()
        assert policy.asked == asked
