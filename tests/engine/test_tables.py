"""Embeddings, tied heads and tables of positions: when their samples are weighed, and when they stay plain.

All in one language model with one outlier a batch; its gradients by the oracle.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_fngd import detach
from hf_fngd.engine.reasons import USED_ELSEWHERE
from hf_fngd.layers.embedding import A_TABLE
from hf_fngd.samples.rows import NOT_THE_BATCH
from tests.engine.language import (
    LENGTH,
    POSITIONS,
    TABLE,
    WIDTH,
    LanguageModel,
    attach,
    batch,
    check,
    clipped,
    losses,
    model,
    plain,
    reasons,
    step,
)

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Again(LanguageModel):
    """A table that is called twice."""

    def embed(self, x: Tensor) -> Tensor:
        return super().embed(x) + self.tokens(x.flip(1)) / 10


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


class TwicePositions(LanguageModel):
    """One that is called twice, and one of its outputs is not added to the batch; ``last`` says which."""

    last = True

    def embed(self, x: Tensor) -> Tensor:
        numbers = torch.arange(LENGTH)[None]
        if self.last:
            return self.tokens(x) * torch.tanh(self.positions(numbers).squeeze(0)) + self.positions(numbers)
        return (self.tokens(x) + self.positions(numbers)) * torch.tanh(self.positions(numbers).squeeze(0))


class TwicePositionsFirst(TwicePositions):
    last = False


class UsesTheTable(LanguageModel):
    def logits(self, y: Tensor) -> Tensor:
        return F.linear(y, self.tokens.weight)


class CallsTheHeadOnSomeTokens(LanguageModel):
    def logits(self, y: Tensor) -> Tensor:
        return self.head(y[:, 1:].flatten(0, 1)).unflatten(0, (len(y), LENGTH - 1))[:, [0, 0, 1]]


class TimeFirst(LanguageModel):
    def embed(self, x: Tensor) -> Tensor:
        return super().embed(x) + self.tokens(x.t()).transpose(0, 1)


class Relative(LanguageModel):
    """A table that pairs of positions look up, as T5's."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.Embedding(LENGTH, WIDTH)

    def embed(self, x: Tensor) -> Tensor:
        place = torch.arange(LENGTH)
        return super().embed(x) + self.pairs((place[:, None] - place).abs()).sum(1)


class Other(LanguageModel):
    """Another embedding for the tokens."""

    def __init__(self, table: type[nn.Embedding]) -> None:
        super().__init__(tied=False)
        self.tokens = table(*self.tokens.weight.shape)

    def embed(self, x: Tensor) -> Tensor:
        found = self.tokens(places=x) if isinstance(self.tokens, Keyword) else self.tokens(x)
        return (found[0] if isinstance(found, tuple) else found) + self.positions(torch.arange(LENGTH)[None])


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


EXCLUDED, NO_TYPE = "among exclude_modules", "Embedding is not a preconditioned layer type"
NOT_AMONG = "Embedding: 'embedding' is not among layer_types"
EVERYTHING = ("fc", "norm", "tokens", "positions", "head")
NOT_TABLE, NOT_POSITIONS = ("fc", "norm", "positions"), ("fc", "norm", "tokens", "head")
Case = tuple[type[LanguageModel], dict[str, Any], tuple[str, ...], dict[str, str]]
CASES: dict[str, Case] = {
    "tied": (LanguageModel, {}, EVERYTHING, {}),
    "not tied": (LanguageModel, {"tied": False}, EVERYTHING, {}),
    "checkpointing": (LanguageModel, {"checkpointing": False}, EVERYTHING, {}),
    "reentrant checkpointing": (LanguageModel, {"checkpointing": True}, EVERYTHING, {}),
    "called twice": (Again, {}, EVERYTHING, {}),
    "positions without a batch dimension": (Flat, {}, NOT_POSITIONS, {POSITIONS: A_TABLE}),
    "positions that are not added": (Scaling, {}, NOT_POSITIONS, {POSITIONS: A_TABLE}),
    "positions that something else reads, too": (Both, {}, NOT_POSITIONS, {POSITIONS: A_TABLE}),
    "positions that are called twice": (TwicePositions, {}, NOT_POSITIONS, {POSITIONS: A_TABLE}),
    "the same in another order": (TwicePositionsFirst, {}, NOT_POSITIONS, {POSITIONS: A_TABLE}),
    "a table of pairs": (Relative, {}, EVERYTHING, {"pairs.weight": NOT_THE_BATCH}),
    # A weight is plain in all of its uses or in none.
    "a table that is used": (UsesTheTable, {}, NOT_TABLE, {TABLE: USED_ELSEWHERE}),
    "a head that is called on some tokens": (CallsTheHeadOnSomeTokens, {}, EVERYTHING, {}),
    "time first": (TimeFirst, {}, NOT_TABLE, {TABLE: NOT_THE_BATCH}),
    "an excluded table": (LanguageModel, {"exclude_modules": ["left_out", "tokens"]}, NOT_TABLE, {TABLE: EXCLUDED}),
    "an excluded head": (LanguageModel, {"exclude_modules": ["left_out", "head"]}, NOT_TABLE, {}),
    "an embedding of one's own": (Other, {"table": Keyword}, EVERYTHING, {}),
    "an embedding that does more": (Other, {"table": Normed}, ("fc", "norm", "positions", "head"), {}),
    "an embedding that returns more": (Other, {"table": Double}, ("fc", "norm", "positions", "head"), {}),
    "without a layer type": (
        LanguageModel,
        {"layer_types": ["linear"]},
        ("fc",),
        {TABLE: NOT_AMONG, POSITIONS: NOT_AMONG},
    ),
    "with a Gram matrix": (LanguageModel, {"sharing": "never"}, (), {TABLE: NO_TYPE, POSITIONS: NO_TYPE}),
}


@pytest.mark.parametrize(("cls", "options", "weighed", "plainly"), CASES.values(), ids=CASES)
def test_what_is_weighed_and_what_stays_plain(
    cls: type[LanguageModel], options: dict[str, Any], weighed: tuple[str, ...], plainly: dict[str, str]
) -> None:
    of_model = {key: options[key] for key in ("tied", "checkpointing", "table") if key in options}
    net, own = model(cls, **of_model), model(cls, **of_model)
    preconditioner = attach(net, **{key: value for key, value in options.items() if key not in of_model})
    # An empty batch tells nothing; a single sample is all of its batch; as many samples as positions, once it is known.
    for number, samples in enumerate((6, 0, 1, 6, 4, LENGTH)):
        x = batch(samples, seed=number)
        output, expected = net(x), plain(own, x)
        assert torch.equal(output, own(x))
        found = step(lambda _, output=output: output, preconditioner, x)
        # A use elsewhere is known, and a table of positions is expanded, from the second forward pass on.
        check(found, expected, "left_out.weight", "left_out.bias", *(plainly if number else [POSITIONS]))
        if number and samples > 1 and weighed:
            check(found, clipped(own, x, *weighed))
    report = preconditioner.coverage()
    assert {name: report.plain[name] for name in plainly} == plainly
    assert {f"{module}.weight" for module in weighed} <= {*report.weighed, *report.preconditioned}
    assert report.missed == {}


class Twice(LanguageModel):
    """Another table of the same weight is called with another length."""

    def __init__(self) -> None:
        super().__init__()
        self.sources = nn.Embedding(*self.tokens.weight.shape)
        self.sources.weight = self.tokens.weight

    def embed(self, x: Tensor) -> Tensor:
        return super().embed(x) + self.sources(torch.cat([x, x], dim=1)).mean(1, keepdim=True)


class Unprobed(LanguageModel):
    """Cannot run in evaluation, as a probe wants it to: sizes have to tell."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.training
        return super().forward(x)


class UnprobedTwice(Twice, Unprobed):
    pass


@pytest.mark.parametrize("cls", [Unprobed, UnprobedTwice])
def test_a_batch_with_as_many_positions_as_samples_waits_for_one_that_tells_of_every_use(
    cls: type[LanguageModel],
) -> None:
    net, told = model(cls), False
    preconditioner = attach(net)
    for samples in (LENGTH, LENGTH, 4, LENGTH):
        told = told or samples != LENGTH
        x = batch(samples, seed=2)
        found = step(net, preconditioner, x)
        assert (TABLE in preconditioner.coverage().weighed) == told
        assert torch.allclose(found[TABLE], plain(net, x)[TABLE]) != told
        resumed = attach(model(cls))
        resumed.load_state_dict(preconditioner.state_dict())
        assert resumed.state_dict()["layers"] == preconditioner.state_dict()["layers"]
        assert resumed.coverage() == preconditioner.coverage()


def test_outside_of_the_models_forward_the_samples_are_not_known() -> None:
    net = model()
    preconditioner = attach(net)
    x = batch(6, seed=2)
    (losses(net, x).sum() + 0 * net.tokens(x).sum()).backward()
    preconditioner.step()
    check(step(net, preconditioner, x), plain(net, x), TABLE)
    assert reasons(preconditioner) == USED_ELSEWHERE


def test_a_forward_on_the_instance_is_left_alone() -> None:
    net = model(tied=False)
    own = net.tokens.forward
    net.tokens.forward = lambda ids: own(ids)
    assert TABLE not in attach(net).coverage().weighed


@pytest.mark.parametrize("way", ["uniform", "evaluation", "detached"])
def test_where_nothing_is_weighed_every_gradient_is_plain(way: str) -> None:
    net, x = model(), batch(6, seed=2)
    preconditioner = attach(net, **({"sharing": "uniform"} if way == "uniform" else {}))
    step(net, preconditioner, batch(6))
    if way == "evaluation":
        net.eval()
        with torch.no_grad():
            assert net(x).grad_fn is None
    elif way == "detached":
        assert type(copy.deepcopy(net.tokens)) is nn.Embedding
        detach(net)
        assert (type(net.tokens), type(net.head), type(net.norm)) == (nn.Embedding, nn.Linear, nn.LayerNorm)
    check(step(net, preconditioner, x), plain(net, x))
