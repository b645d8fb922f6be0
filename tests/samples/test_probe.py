"""Who is a sample: what the probe tells of batches that sizes get wrong, against the oracle, and what it leaves."""

import copy
import dataclasses
import random
from collections import UserDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from hf_fngd import FNGDPreconditioner
from hf_fngd.layers.base import AMBIGUOUS
from hf_fngd.samples.probe import CannotProbeError, probe, resized
from hf_fngd.samples.rows import NOT_THE_BATCH, View
from tests.nets import EVERY_TYPE, settings_of
from tests.reference import Clipping, Dense, per_sample_gradients, uses_of

WIDTH, CLASSES = 6, 3
DAMPING = 0.03


class Attention(nn.Module):
    """Two Linear layers with attention over the positions between them, ``[N, T, d]`` whatever the input's order."""

    def __init__(self, order: str = "batch first") -> None:
        super().__init__()
        self.order = order
        self.norm, self.rms = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.fc1, self.fc2, self.fc3 = nn.Linear(WIDTH, 5), nn.Linear(5, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "time first":
            y = self.fc1(self.norm(x))
            scores = torch.einsum("tnd,snd->nts", y, y).softmax(-1)
            y = self.rms(self.fc2(torch.einsum("nts,snd->tnd", scores, y))).tanh()
            return self.fc3(y).mean(0)
        n, t = x.shape[:2]
        y = self.fc1(self.norm(x))
        y = torch.einsum("nts,nsd->ntd", torch.einsum("ntd,nsd->nts", y, y).softmax(-1), y)
        if self.order == "folded, samples first":
            return self.fc3(self.rms(self.fc2(y.flatten(0, 1))).tanh()).view(n, t, -1).mean(1)
        if self.order == "folded, positions first":
            return self.fc3(self.rms(self.fc2(y.transpose(0, 1).flatten(0, 1))).tanh()).view(t, n, -1).mean(0)
        return self.fc3(self.rms(self.fc2(y)).tanh()).mean(1)


def build(order: str) -> Attention:
    torch.manual_seed(0)
    return Attention(order).double()


def batch(n: int, t: int, order: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + 100 * t)
    x = torch.randn(n, t, WIDTH, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (n,), generator=generator)
    return (x.transpose(0, 1).contiguous() if order == "time first" else x), y


def expected(model: nn.Module, x: Tensor, y: Tensor, sharing: str, dim: int, modules: list[str]) -> dict[str, Tensor]:
    """The weighted gradients of these modules, by the oracle."""

    def alone(model: nn.Module, n: int) -> Tensor:
        return F.cross_entropy(model(x.narrow(dim, n, 1)), y[n : n + 1])

    found: dict[str, Tensor] = {}
    if sharing == "clipped":
        trained = {name for name, _ in model.named_parameters()}

        def share(model: nn.Module, n: int) -> Tensor:
            return alone(model, n) / len(y)

        found, _ = Clipping().gradients([uses_of(model, modules, share, n, trained) for n in range(len(y))])
    else:
        for name in modules:
            own = dict(model.get_submodule(name).named_parameters(name))
            p = Dense(per_sample_gradients(model, list(own.values()), alone, len(y)), DAMPING).p
            found.update(zip(own, p.split([q.numel() for q in own.values()]), strict=True))
    return {name: g.view_as(model.get_parameter(name)) for name, g in found.items()}


@pytest.mark.parametrize("sharing", ["never", "clipped"])
@pytest.mark.parametrize(("first", "later"), [((5, 7), (3, 4)), ((6, 6), (6, 6)), ((1, 4), (5, 3)), ((2, 2), (4, 1))])
@pytest.mark.parametrize("order", ["batch first", "time first", "folded, samples first", "folded, positions first"])
def test_samples_are_weighed_wherever_they_are(
    order: str, first: tuple[int, int], later: tuple[int, int], sharing: str
) -> None:
    if order == "time first" and first[0] == 1:
        pytest.skip("the batch begins with positions, and is no batch of one")
    model, dim = build(order), int(order == "time first")
    plain = copy.deepcopy(model)
    settings = settings_of(sharing, damping=DAMPING)
    preconditioner = FNGDPreconditioner(model, strict=True, **settings)
    modules = ["fc1", "fc2", "fc3"] + ["norm", "rms"] * (sharing == "clipped")
    for sizes in (first, later):
        x, y = batch(*sizes, order)
        x.select(dim, 0).mul_(20)
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        preconditioner.step()
        for name, g in expected(plain, x, y, sharing, dim, modules).items():
            torch.testing.assert_close(model.get_parameter(name).grad, g, rtol=1e-7, atol=1e-10, msg=name)
    assert preconditioner.coverage().missed == {}
    assert preconditioner.coverage().note == ""


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("sizes", [(5, 7), (6, 6), (1, 4)])
@pytest.mark.parametrize("order", ["batch first", "time first", "folded, samples first", "folded, positions first"])
def test_samples_are_told_in_bf16_too(order: str, sizes: tuple[int, int]) -> None:
    if order == "time first" and sizes[0] == 1:
        pytest.skip("the batch begins with positions, and is no batch of one")
    model, dim = build(order).float(), int(order == "time first")
    exact = copy.deepcopy(model).double()
    preconditioner = FNGDPreconditioner(model, strict=True, **settings_of("clipped"))
    x, y = batch(*sizes, order)
    x.select(dim, 0).mul_(20)
    with torch.autocast("cpu", torch.bfloat16):
        F.cross_entropy(model(x.float()), y).backward()
    preconditioner.step()
    for name, g in expected(exact, x, y, "clipped", dim, ["fc1", "fc2", "fc3"]).items():
        error = (model.get_parameter(name).grad - g).norm() / g.norm()
        assert error < 0.1, (name, error)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("sizes", [(5, 7), (6, 6)])
@pytest.mark.parametrize("order", ["batch first", "time first", "folded, samples first", "folded, positions first"])
def test_samples_are_told_in_compiled_models_too(order: str, sizes: tuple[int, int]) -> None:
    """By the first batch; where that is not first, its own gradient is plain, and the graph is made anew."""
    dim, counter = int(order == "time first"), CompileCounterWithBackend("aot_eager")
    model = build(order)
    plain = copy.deepcopy(model)
    preconditioner = FNGDPreconditioner(model, **settings_of("clipped"))
    called = torch.compile(model, backend=counter, fullgraph=True)
    x, y = batch(*sizes, order)
    x.select(dim, 0).mul_(20)
    for step in range(3):
        model.zero_grad()
        torch.manual_seed(step)
        F.cross_entropy(called(x), y).backward()
        preconditioner.step()
        drawn = torch.get_rng_state()
        torch.manual_seed(step)
        F.cross_entropy(plain(x), y)
        assert torch.equal(drawn, torch.get_rng_state())
        if step or not dim:
            for name, g in expected(plain, x, y, "clipped", dim, ["fc1", "fc2", "fc3", "norm"]).items():
                torch.testing.assert_close(model.get_parameter(name).grad, g, rtol=1e-7, atol=1e-10, msg=name)
    report = preconditioner.coverage()
    assert (report.missed, report.note) == ({}, "")
    assert ("rms.weight" in report.weighed) == (order == "batch first")  # a graph has its samples summed up elsewhere
    assert counter.frame_count == 1 + dim


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("given", "reason"), [(object(), "inputs that are no tensors"), (None, "RuntimeError: eager")])
def test_a_compiled_model_that_cannot_run_eagerly_is_told_by_sizes(given: object, reason: str) -> None:
    class Odd(Attention):
        def forward(self, x: Tensor, other: Any = None) -> Tensor:
            if other is None and not torch.compiler.is_compiling():
                raise RuntimeError("eager")
            return super().forward(x)

    torch.manual_seed(0)
    model = Odd().double()
    preconditioner = FNGDPreconditioner(model)
    x, y = batch(5, 4, "batch first")
    F.cross_entropy(torch.compile(model, backend="aot_eager")(x, given), y).backward()
    preconditioner.step()
    assert preconditioner.coverage().missed == {}
    assert reason in preconditioner.coverage().note


class TimeFirst(nn.Module):
    """Positions first, as torch's recurrent layers have it by default; the head sees the last state alone."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embedding, self.fc1 = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.lstm, self.fc2 = nn.LSTM(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        y = self.fc1(self.embedding(ids))
        if self.kind == "layer":
            return self.fc2(self.lstm(y)[1][0][-1])
        state = torch.zeros_like(y[0])
        for one in y:  # a cell, and as many calls of it as there are positions
            state = torch.tanh(self.fc2(one).mean(-1, keepdim=True) + one + state)
        return self.fc2(state)


@pytest.mark.parametrize("kind", ["layer", "cell"])
@pytest.mark.parametrize(("samples", "positions"), [(5, 3), (4, 4), (2, 6), (1, 3)])
def test_the_second_dimension_is_taken_where_it_tells_of_more_layers(samples: int, positions: int, kind: str) -> None:
    torch.manual_seed(0)
    model = TimeFirst(kind).double()
    plain, ids = copy.deepcopy(model), torch.randint(11, (positions, samples))
    labels = torch.randint(CLASSES, (samples,))
    weights = torch.ones(samples, dtype=torch.float64).index_fill(0, torch.tensor(0), 30)

    def share(model: nn.Module, n: int) -> Tensor:
        return weights[n] * F.cross_entropy(model(ids[:, n : n + 1]), labels[n : n + 1])

    preconditioner = FNGDPreconditioner(model, strict=True, exclude_modules=["lstm"])
    (weights * F.cross_entropy(model(ids), labels, reduction="none")).sum().backward()
    preconditioner.step()
    names = {name for name, _ in model.named_parameters()}
    modules = ["embedding", "fc1", "fc2"]
    wanted, _ = Clipping().gradients([uses_of(plain, modules, share, n, names) for n in range(samples)])
    for name, g in wanted.items():
        found = model.get_parameter(name).grad
        torch.testing.assert_close(found, g.view_as(found), rtol=1e-7, atol=1e-10, msg=name)


class Experts(nn.Module):
    """Tokens go to the expert that ``routes`` ``[N, T]`` names; attention over the positions comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.fc0, self.fc1, self.fc2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])

    def forward(self, x: Tensor, routes: Tensor) -> Tensor:
        y = self.fc1(self.fc0(x).tanh())
        tokens = (y @ y.mT).softmax(-1).matmul(y).flatten(0, 1)
        found = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows = (routes.flatten() == number).nonzero()[:, 0]
            found = found.index_add(0, rows, expert(tokens[rows]))
        return self.fc2(found.unflatten(0, routes.shape).tanh()).mean(1)


@pytest.mark.parametrize(("dtype", "factor"), [(torch.bfloat16, 1e3), (torch.float32, 1e5), (torch.float64, 1e10)])
def test_an_outsized_row_does_not_hide_what_became_of_the_others(dtype: torch.dtype, factor: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 5).to(dtype)
    x[3] *= factor

    def run(args: Any, kwargs: Any) -> Any:
        (x,) = args
        mixed = x + x.clamp(-3, 3).mean(0)  # as far as the samples change each other, the outsized one hardly does
        return {place: [(tuple(x.shape), values[:, 0])] for place, values in enumerate([mixed, x, x, x])}

    found = probe(nn.Linear(5, 5), run, ((x,), {}), x, None)
    assert isinstance(found.verdicts[0], str)
    assert [found.verdicts[place] for place in (1, 2, 3)] == [View(0, "one")] * 3


ROUTES = {
    "one of the first sample, unlike of others": [[0, 1, 1], [0, 0, 0], [1, 1, 1], [1, 1, 1]],
    "two of the first sample, unlike of others": [[0, 0, 1], [0, 0, 0], [0, 1, 1], [0, 0, 1]],
    "as many of each sample": [[0, 1, 1], [0, 1, 1], [1, 1, 0], [1, 0, 1]],
}


@pytest.mark.parametrize("routes", ROUTES.values(), ids=ROUTES)
def test_an_expert_is_weighed_only_if_every_sample_has_its_share(routes: list[list[int]]) -> None:
    torch.manual_seed(0)
    model, route = Experts().double(), torch.tensor(routes)
    plain, x = copy.deepcopy(model), torch.randn(4, 3, WIDTH, dtype=torch.float64)
    x[2] *= 20
    preconditioner = FNGDPreconditioner(model)
    for net in (model, plain):
        net(x, route).square().sum().backward()
    preconditioner.step()
    equal = len({sum(row) for row in routes}) == 1
    modules = ["fc0", "fc1", "fc2"] + ["experts.0", "experts.1"] * equal
    found = preconditioner.coverage()
    assert ("experts.0.weight" in found.missed) == ("experts.1.weight" in found.missed) == (not equal)

    def share(model: nn.Module, n: int) -> Tensor:
        return model(x[n : n + 1], route[n : n + 1]).square().sum()

    names = {name for name, _ in plain.named_parameters()}
    wanted = {name: p.grad for name, p in plain.named_parameters()}
    plain.zero_grad()
    wanted |= Clipping().gradients([uses_of(plain, modules, share, n, names) for n in range(4)])[0]
    for name, g in wanted.items():
        own = model.get_parameter(name).grad
        torch.testing.assert_close(own, g.view_as(own), rtol=1e-7, atol=1e-10, msg=name)


class Transformer(nn.Module):
    """torch's own, with positions first, and a mask with the batch first: a position less is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Transformer(8, 2, 1, 1, 8, dropout=0.0)

    def forward(self, source: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = self.both(source, target, src_key_padding_mask=mask)
        return y


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_the_second_dimension_is_tried_where_the_first_one_fails() -> None:
    torch.manual_seed(0)
    model = Transformer().double()
    plain = copy.deepcopy(model)
    source, target = torch.randn(7, 5, 8).double(), torch.randn(6, 5, 8).double()
    target[:, 2] *= 30
    mask = torch.zeros(5, 7, dtype=torch.bool)
    preconditioner = FNGDPreconditioner(
        model, sharing="never", damping=DAMPING, strict=True, exclude_modules=r".*attn(\.out_proj)?"
    )
    weights = torch.tensor([1.0, 1, 9, 1, 1], dtype=torch.float64)

    def alone(model: nn.Module, n: int) -> Tensor:
        return weights[n] * model(source[:, n : n + 1], target[:, n : n + 1], mask[n : n + 1]).sin().sum()

    (model(source, target, mask).sin().sum((0, 2)) * weights).mean().backward()
    preconditioner.step()
    layers = [layer.name for layer in preconditioner.layers]
    assert len(layers) == 4
    for name in layers:
        own = list(plain.get_submodule(name).parameters())
        p = Dense(per_sample_gradients(plain, own, alone, 5), DAMPING).p
        found = torch.cat([q.grad.flatten() for q in model.get_submodule(name).parameters()])
        torch.testing.assert_close(found, p.flatten(), rtol=1e-7, atol=1e-10)


class Stream(nn.Module):
    """Texts one behind the other in one row of tokens, ``[tokens]``, with attention within each text."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc, self.head = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids: Tensor, ends: Tensor) -> Tensor:
        text = torch.searchsorted(ends, torch.arange(len(input_ids)), right=True)
        y = self.fc(self.table(input_ids))
        scores = (y @ y.t()).masked_fill(text[:, None] != text, -torch.inf).softmax(-1)
        return self.head(torch.tanh(scores @ y)).mean(0, keepdim=True)


def test_tokens_of_a_row_are_no_samples() -> None:
    model = Stream().double()
    preconditioner = FNGDPreconditioner(model)
    ids, ends = torch.arange(11) % 9, torch.tensor([4, 7, 11])
    plain = torch.autograd.grad(model(ids, ends).square().sum(), list(model.parameters()))
    model(ids, ends).square().sum().backward()
    preconditioner.step()
    for p, g in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, g)
    report = preconditioner.coverage()
    assert not report.preconditioned
    assert not report.weighed


class Rows(nn.Module):
    """A layer that sees some rows of its own in the first step, which are as many as there are samples, or fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0
        self.fc1, self.fc2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.register_buffer("table", torch.randn(20, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(self.table[: self.rows].to(x)).mean(0) if self.rows else self.fc1(x)
        return self.fc2(y.tanh() + x)


@pytest.mark.parametrize("rows", [5, 3])
def test_an_odd_first_batch_is_neither_believed_nor_the_last_word(rows: int) -> None:
    model = Rows().double()
    plain = copy.deepcopy(model)
    preconditioner = FNGDPreconditioner(model, sharing="never", damping=DAMPING)
    x, y = torch.randn(5, WIDTH, dtype=torch.float64), torch.arange(5) % CLASSES
    for model.rows in (rows, 0):
        plain.rows = model.rows
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        preconditioner.step()
        if model.rows:
            (g,) = torch.autograd.grad(F.cross_entropy(plain(x), y), [plain.fc1.weight])
        else:
            g = expected(plain, x, y, "never", 0, ["fc1"])["fc1.weight"]
        torch.testing.assert_close(model.fc1.weight.grad, g)
        assert preconditioner.coverage().missed["fc1.weight"] == NOT_THE_BATCH


class Trained(nn.Module):
    """Keeps counts, draws numbers, and cannot stand another batch size in evaluation where it is told so."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 5), nn.Linear(5, CLASSES)
        self.norm, self.drop = nn.BatchNorm1d(5), nn.Dropout()
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[int] = []
        self.cache: Tensor | None = None
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        if self.fails and not self.training:
            raise ValueError("training only")
        self.calls += 1
        self.seen.append(len(x))
        self.cache = x
        random.random()
        noise = torch.rand(())
        return self.fc2(self.drop(self.norm(self.fc1(x)))) + 0 * noise


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_a_probe_remains(fails: bool) -> None:
    model, x = Trained(fails), torch.randn(5, WIDTH)
    model.drop.eval()
    model.drop.p = 0.5
    other = copy.deepcopy(model)
    watched: list[int] = []
    for net in (model, other):
        net.fc1.register_forward_hook(lambda _, args, output: watched.append(len(args[0])))
    preconditioner = FNGDPreconditioner(model)
    outputs = []
    for net in (model, other):
        torch.manual_seed(3)
        random.seed(3)
        outputs.append((net(x), torch.rand(2), random.random()))
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*outputs, strict=True))
    assert [module.training for module in model.modules()] == [module.training for module in other.modules()]
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert watched == [5, 5]
    assert model.seen == [5]
    assert model.cache is x
    assert ("training only" in preconditioner.coverage().note) == fails
    assert ("batch_dim" in str(preconditioner.coverage())) == fails


def test_a_probe_leaves_no_casts_without_a_graph_behind() -> None:
    model = Trained()
    preconditioner = FNGDPreconditioner(model, exclude_modules=["fc2"])
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(5, WIDTH)).sum().backward()
    assert model.fc2.weight.grad is not None
    preconditioner.step()
    assert preconditioner.coverage().preconditioned == ("fc1.weight", "fc1.bias")
    assert preconditioner.coverage().note == ""


@pytest.mark.parametrize("batch_dim", [None, 0])
def test_where_no_probe_can_run_an_argument_tells_what_sizes_do_not(batch_dim: int | None) -> None:
    class Closed(Attention):
        def forward(self, x: Tensor) -> Tensor:
            assert self.training
            return super().forward(x)

    model = Closed().double()
    preconditioner = FNGDPreconditioner(model, batch_dim=batch_dim)
    x, y = batch(4, 4, "batch first")
    F.cross_entropy(model(x), y).backward()
    preconditioner.step()
    assert set(preconditioner.coverage().missed.values()) == ({AMBIGUOUS} if batch_dim is None else set())


def test_an_argument_says_that_positions_come_first_where_nothing_else_can() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES)).double()
    plain = copy.deepcopy(model)
    preconditioner = FNGDPreconditioner(model, batch_dim=1, layer_types=EVERY_TYPE)
    x = torch.randn(4, 5, WIDTH, dtype=torch.float64)
    x[:, 2] *= 10
    (model(x).square().sum((0, 2)).mean()).backward()

    def alone(model: nn.Module, n: int) -> Tensor:
        return model(x[:, n : n + 1]).square().sum() / 5

    trained = {name for name, _ in plain.named_parameters()}
    found, _ = Clipping().gradients([uses_of(plain, ["0", "2"], alone, n, trained) for n in range(5)])
    for name, g in found.items():
        torch.testing.assert_close(model.get_parameter(name).grad.flatten(), g)
    preconditioner.step()


class Pairs(nn.Module):
    """Looks up a table of ids of its own, which has as many rows as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x + self.table(torch.arange(10).view(5, 2) % 9).mean((0, 1)))


def test_rows_of_ids_of_the_models_own_are_no_samples() -> None:
    model = Pairs().double()
    plain = copy.deepcopy(model)
    preconditioner = FNGDPreconditioner(model)
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    for net in (model, plain):
        net(x).square().sum().backward()
    preconditioner.step()
    torch.testing.assert_close(model.table.weight.grad, plain.table.weight.grad)
    assert preconditioner.coverage().plain == {"table.weight": NOT_THE_BATCH}


class Routed(nn.Module):
    """An expert sees the tokens that a router sends it, of which there are as many as samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.expert, self.head = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.first(x).flatten(0, 1)
        chosen = tokens[:, 0].topk(len(x)).indices
        return self.head(tokens.index_add(0, chosen, self.expert(tokens[chosen])).view(x.shape)).mean(1)


def test_as_many_routed_tokens_as_samples_are_none() -> None:
    model = Routed().double()
    plain = copy.deepcopy(model)
    preconditioner = FNGDPreconditioner(model)
    x = torch.randn(5, 4, WIDTH, dtype=torch.float64)
    for net in (model, plain):
        net(x).square().sum().backward()
    preconditioner.step()
    torch.testing.assert_close(model.expert.weight.grad, plain.expert.weight.grad)
    assert not torch.allclose(model.head.weight.grad, plain.head.weight.grad)
    assert set(preconditioner.coverage().missed) == {"expert.weight", "expert.bias"}


@dataclasses.dataclass
class Inputs:
    x: Tensor
    more: Any = None


def test_what_holds_a_batch_is_made_smaller_or_larger() -> None:
    x = torch.arange(6).view(3, 2)
    holds = {
        "a": [x, "text"],
        "b": (x, None, 1.5),
        "c": Inputs(x, {"ids": x}),
        "d": UserDict(x=x),
        "e": ["p", "q", "r"],
    }
    found = resized(holds, 3, 0)
    for one in (found["a"][0], found["b"][0], found["c"].x, found["c"].more["ids"], found["d"]["x"]):
        assert torch.equal(one, x[1:])
    assert found["e"] == ["q", "r"]
    assert holds["d"]["x"] is x
    assert torch.equal(resized(x[:1], 1, 0), torch.cat([x[:1], x[:1]]))
    assert torch.equal(resized(x, 2, 1), x[:, 1:])
    backwards = resized(holds, 3, 0, reverse=True)
    assert torch.equal(backwards["a"][0], x[[2, 1]])
    assert backwards["e"] == ["r", "q"]
    with pytest.raises(CannotProbeError, match="generator"):
        resized([iter(x) for _ in [0]] and (n for n in x), 3, 0)
