"""Weights outside of the preconditioned layers: embeddings and tied heads (``weigh_rest``)."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hf_fngd import FNGD, FNGDPreconditioner, detach
from hf_fngd.backward import AMBIGUOUS, NOT_THE_BATCH, ON_TOP_OF_ANOTHER, USED_ELSEWHERE, MicroBatch
from hf_fngd.sharing import INDEX_COLUMN, BatchInfo, SharingPolicy

VOCABULARY, LENGTH, WIDTH = 11, 3, 4
TABLE = "tokens.weight"
PLAIN = ["positions.weight", "norm.weight", "norm.bias", "left_out.weight", "left_out.bias"]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class LanguageModel(nn.Module):
    """Two tables, two layers, one of which is left out, a norm, and a head that shares the tokens' table."""

    def __init__(self, checkpointing: bool | None = None, tied: bool = True) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.left_out = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.tokens = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def embed(self, x: Tensor) -> Tensor:
        return self.tokens(x) + self.positions(torch.arange(LENGTH))

    def body(self, y: Tensor) -> Tensor:
        return self.norm(y + self.left_out(torch.tanh(self.fc(y))))

    def logits(self, y: Tensor) -> Tensor:
        return self.head(y)

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointing is None:
            return self.logits(self.body(self.embed(x)))
        y = self.embed(x) if self.checkpointing else checkpoint(self.embed, x, use_reentrant=False)
        return self.logits(checkpoint(self.body, y, use_reentrant=self.checkpointing))


def model(dtype: torch.dtype = torch.float64, cls: type[LanguageModel] = LanguageModel, **kwargs: Any) -> LanguageModel:
    torch.manual_seed(0)
    return cls(**kwargs).to(dtype)


def batch(samples: int, seed: int = 1) -> Tensor:
    return torch.randint(1, VOCABULARY, (samples, LENGTH), generator=torch.Generator().manual_seed(seed))


def losses(net: Callable[..., Tensor], x: Tensor, **kwargs: Any) -> Tensor:
    """The samples' losses ``[N]``, the first of which counts 100 times."""
    logits = net(x, **kwargs)
    each = F.cross_entropy(logits.transpose(1, 2), x.roll(1, 0), reduction="none").mean(1)
    return each * torch.tensor([100.0] + [1.0] * (len(x) - 1))


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def weighted(net: nn.Module, x: Tensor, w: Tensor | None = None) -> dict[str, Tensor]:
    """The weighted sums of the plain per-sample gradients, by autograd alone; w = 1 where not given."""
    plain = copy.deepcopy(net)
    plain.zero_grad()
    (losses(plain, x).mul(torch.ones(len(x)) if w is None else w).mean()).backward()
    return gradients(plain)


def check(found: dict[str, Tensor], expected: dict[str, Tensor], *names: str) -> None:
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-14)


def attach(net: nn.Module, sharing: str | SharingPolicy = "last", **kwargs: Any) -> FNGDPreconditioner:
    arguments = {"coefficient_steps": 1, "refresh": 0, "exclude_modules": ["left_out"]} | kwargs
    return FNGDPreconditioner(net, 0.1, sharing=sharing, **arguments)


def after_a_coefficient_step(net: nn.Module, sharing: str = "last", **kwargs: Any) -> FNGDPreconditioner:
    """A preconditioner whose next step is a shared one."""
    preconditioner = attach(net, sharing, **kwargs)
    losses(net, batch(6)).mean().backward()
    preconditioner.step()
    net.zero_grad()
    return preconditioner


def kept(preconditioner: FNGDPreconditioner) -> Tensor:
    """The mean over the layers of the weights that the policy keeps ``[N]``."""
    return preconditioner.policy.row.mean(0)


def reasons(preconditioner: FNGDPreconditioner, name: str = TABLE) -> str:
    return preconditioner.coverage().plain[name]


# The weighted sums --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("times", [1, 2])
def test_gradients_are_weighted_sums_with_the_mean_weights_of_the_layers(times: int, tied: bool) -> None:
    net = model(tied=tied)
    w = kept(after_a_coefficient_step(net))
    assert float(w.min()) < 0.5
    x = batch(6, seed=2)
    total = losses(net, x).mean()
    for time in range(times):
        total.backward(retain_graph=time + 1 < times)
    found = {name: grad / times for name, grad in gradients(net).items()}
    plain = weighted(net, x)
    check(found, weighted(net, x, w), TABLE)
    check(found, plain, *PLAIN)
    assert not torch.allclose(found[TABLE], plain[TABLE], rtol=0.01)


def test_ranks_are_those_of_the_output_gradients() -> None:
    net = model(tied=False)
    in_order = kept(after_a_coefficient_step(net, sharing="ranked"))
    x, seen = batch(6, seed=2), list[Tensor]()
    net.positions.register_forward_hook(lambda *_: None)
    net.tokens.register_forward_hook(
        lambda _, __, output: output.register_hook(lambda g: seen.append(g.flatten(1).norm(dim=1))) and None
    )
    losses(net, x).mean().backward()
    w = torch.empty_like(in_order)
    w[seen[0].argsort()] = in_order
    check(gradients(net), weighted(net, x, w), TABLE)


def test_a_retained_graph_keeps_its_weights() -> None:
    net = model(tied=False)
    after_a_coefficient_step(net, sharing="ranked")
    each = losses(net, batch(6, seed=2))
    each.mean().backward(retain_graph=True)
    first = gradients(net)[TABLE]
    net.zero_grad()
    (each * torch.arange(6.0)).mean().backward(retain_graph=True)  # other norms
    second = gradients(net)[TABLE]
    net.zero_grad()
    (each * (1 + torch.arange(6.0))).mean().backward()
    torch.testing.assert_close(gradients(net)[TABLE], first + second)


def test_weights_that_follow_samples_reach_them() -> None:
    net, x = model(), batch(6)
    preconditioner = attach(net, "index")
    losses(net, x, **{INDEX_COLUMN: torch.arange(6)}).mean().backward()
    preconditioner.step()
    net.zero_grad()
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    losses(net, x[order], **{INDEX_COLUMN: order}).mean().backward()
    w = preconditioner.policy.table.mean(0)[order]
    check(gradients(net), weighted(net, x[order], w / w.mean()), TABLE)


def test_an_outlier_is_small_there_too() -> None:
    net = model()
    after_a_coefficient_step(net, sharing="ranked")
    x = batch(6, seed=2)
    losses(net, x).mean().backward()
    assert float(gradients(net)[TABLE].norm() / weighted(net, x)[TABLE].norm()) < 0.5


def test_another_batch_size_has_weights_too() -> None:
    net = model()
    preconditioner = after_a_coefficient_step(net)
    x = batch(4, seed=2)
    losses(net, x).mean().backward()
    w = preconditioner.policy.fit(preconditioner.policy.row, 4).mean(0)
    check(gradients(net), weighted(net, x, w), TABLE)


@pytest.mark.parametrize(("sharing", "follows"), [("ranked", True), ("last", False), ("replay", False)])
def test_a_coefficient_step_has_earlier_weights_of_policies_that_follow_samples(sharing: str, follows: bool) -> None:
    net = model(tied=False)
    preconditioner = attach(net, sharing, coefficient_steps=2)
    x = batch(6)
    losses(net, x).mean().backward()
    check(gradients(net), weighted(net, x), TABLE)  # there are none before the first
    preconditioner.step()
    net.zero_grad()
    losses(net, x).mean().backward()
    if follows:
        # The same batch again, and so the same ranks as in the layers.
        check(
            gradients(net), weighted(net, x, preconditioner.policy.decode(kept(preconditioner), _norms(net, x))), TABLE
        )
    else:
        check(gradients(net), weighted(net, x), TABLE)


def _norms(net: LanguageModel, x: Tensor) -> Tensor:
    plain = copy.deepcopy(net)
    y = plain.tokens(x)
    logits = plain.logits(plain.body(y + plain.positions(torch.arange(LENGTH))))
    (g,) = torch.autograd.grad(losses(lambda _: logits, x).mean(), y)
    return g.flatten(1).norm(dim=1)


def test_layers_that_were_never_measured_have_no_say() -> None:
    class Unused(LanguageModel):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    net = model(cls=Unused)
    preconditioner = after_a_coefficient_step(net)
    assert [layer.name for layer in preconditioner.layers] == ["fc", "a", "b"]
    x = batch(6, seed=2)
    losses(net, x).mean().backward()
    check(gradients(net), weighted(net, x, preconditioner.policy.row[0]), TABLE)


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
    assert reasons(preconditioner, "positions.weight") == NOT_THE_BATCH


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
    assert isinstance(preconditioner._batch, MicroBatch)
    reference = weakref.ref(preconditioner._batch)
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


# In other modes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_makes_no_difference(reentrant: bool) -> None:
    found = []
    for checkpointing in (None, reentrant):
        net = model(checkpointing=checkpointing)
        after_a_coefficient_step(net, sharing="ranked")
        losses(net, batch(6, seed=2)).mean().backward()
        found.append(gradients(net))
    check(found[1], found[0], TABLE, *PLAIN)


def test_reentrant_checkpointing_of_several_batches_at_once_is_plain() -> None:
    class Whole(LanguageModel):
        def forward(self, x: Tensor) -> Tensor:
            mark = torch.zeros((), requires_grad=True)  # reentrant checkpointing wants an input with a gradient
            y = checkpoint(lambda mark: self.embed(x) + mark, mark, use_reentrant=True)
            return self.logits(self.body(y))

    net = model(cls=Whole, tied=False)
    preconditioner = after_a_coefficient_step(net)
    parts = batch(12, seed=2).split(6)
    first, second = (losses(net, part).mean() for part in parts)
    first.backward()
    second.backward()
    assert ON_TOP_OF_ANOTHER in reasons(preconditioner)


def test_micro_batches_add_up() -> None:
    net = model()
    w = kept(after_a_coefficient_step(net))
    expected = []
    for part in batch(12, seed=2).split(6):
        losses(net, part).mean().backward()
        expected.append(weighted(net, part, w)[TABLE])
    check(gradients(net), {TABLE: expected[0] + expected[1]}, TABLE)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("sharing", ["last", "ranked"])
def test_a_compiled_model_has_the_same_gradients(sharing: str) -> None:
    class InPlace(LanguageModel):
        def embed(self, x: Tensor) -> Tensor:
            y = self.tokens(x)
            y += self.positions(torch.arange(LENGTH))
            return y

    found = []
    for compiles in (False, True):
        net = model(cls=InPlace)
        preconditioner = attach(net, sharing, coefficient_steps=2)
        called = torch.compile(net, backend="aot_eager", fullgraph=True) if compiles else net
        for seed in (1, 2, 3):
            net.zero_grad()
            losses(called, batch(6, seed)).mean().backward()
            preconditioner.step()
        found.append(gradients(net))
        assert TABLE in preconditioner.coverage().weighed
    check(found[1], found[0], TABLE, *PLAIN)


# State and report ---------------------------------------------------------------------------------------------


def train(net: nn.Module, optimizer: FNGD, seeds: range) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        losses(net, batch(6, seed)).mean().backward()
        optimizer.step()


def test_an_interrupted_run_goes_on_as_it_would_have() -> None:
    def make() -> tuple[nn.Module, FNGD]:
        net = model()
        return net, FNGD(net, coefficient_steps=3, refresh=2)

    whole, optimizer = make()
    train(whole, optimizer, range(9))
    first, optimizer = make()
    train(first, optimizer, range(4))
    second, resumed = make()
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.coverage() == optimizer.coverage()
    train(second, resumed, range(4, 9))
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name


def test_a_state_of_another_rest_is_refused_and_one_of_before_is_taken() -> None:
    net = model()
    optimizer = FNGD(net)
    train(net, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"the checkpoint weighs the samples of tokens, positions, head, this .* none"):
        FNGD(model(), weigh_rest=False).load_state_dict(state)
    del state["param_groups"][0]["fngd"]["engine"]["rest"]
    FNGD(model()).load_state_dict(state)


def test_the_report_names_what_is_weighed() -> None:
    net = model()
    preconditioner = attach(net)
    assert preconditioner.coverage().weighed == ("tokens.weight", "positions.weight", "head.weight")
    losses(net, batch(6)).mean().backward()
    preconditioner.step()
    report = preconditioner.coverage()
    assert report.weighed == ("tokens.weight", "head.weight")
    assert report.plain["positions.weight"] == NOT_THE_BATCH
    assert not set(report.plain) & set(report.weighed)
    assert str(report).splitlines()[0] == (
        "FNGD preconditions 2 parameters, and weighs the samples of tokens.weight, head.weight by the mean of their "
        "weights."
    )
