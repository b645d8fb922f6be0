"""Weights outside of the preconditioned layers: embeddings, tied heads, layers that were left out (``weigh_rest``)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hf_fngd import FNGD, FNGDPreconditioner, detach
from hf_fngd.sharing import INDEX_COLUMN

VOCABULARY, LENGTH, WIDTH = 11, 3, 4
REST = ["tokens.weight", "left_out.weight", "left_out.bias"]
PLAIN = ["positions.weight", "norm.weight", "norm.bias"]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.left_out = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.left_out(torch.tanh(self.fc(x))))


class LanguageModel(Block):
    """Two tables, two layers, one of which is left out, a norm, and a head that shares the tokens' table."""

    def __init__(self, checkpointing: bool | None = None) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.tokens = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.tokens(x) + self.positions(torch.arange(LENGTH))
        if self.checkpointing is None:
            y = super().forward(y)
        else:
            y = checkpoint(super().forward, y, use_reentrant=self.checkpointing)
        return self.head(y)


def model(dtype: torch.dtype = torch.float64, **kwargs: Any) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(**kwargs).to(dtype)


def batch(samples: int, seed: int = 1) -> Tensor:
    return torch.randint(1, VOCABULARY, (samples, LENGTH), generator=torch.Generator().manual_seed(seed))


def losses(net: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
    """The samples' losses ``[N]``, the first of which counts 100 times."""
    logits = net(x, **kwargs)
    each = F.cross_entropy(logits.transpose(1, 2), x.roll(1, 0), reduction="none").mean(1)
    return each * torch.tensor([100.0] + [1.0] * (len(x) - 1))


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def weighted(net: nn.Module, x: Tensor, w: Tensor) -> dict[str, Tensor]:
    """The weighted sums of the plain per-sample gradients, by autograd alone."""
    plain = copy.deepcopy(net)
    plain.zero_grad()
    (losses(plain, x).mul(w).mean()).backward()
    return gradients(plain)


def check(found: dict[str, Tensor], expected: dict[str, Tensor], names: list[str]) -> None:
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-14)


def attach(net: nn.Module, sharing: str = "last", **kwargs: Any) -> FNGDPreconditioner:
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


# The weighted sums --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2])
def test_gradients_are_weighted_sums_with_the_mean_weights_of_the_layers(times: int) -> None:
    net = model()
    w = kept(after_a_coefficient_step(net))
    assert float(w.min()) < 0.5
    x = batch(6, seed=2)
    total = losses(net, x).mean()
    for time in range(times):
        total.backward(retain_graph=time + 1 < times)
    found = {name: grad / times for name, grad in gradients(net).items()}
    plain = weighted(net, x, torch.ones(6))
    check(found, weighted(net, x, w), REST)
    check(found, plain, PLAIN)
    assert not any(torch.allclose(found[name], plain[name], rtol=0.01) for name in REST)


def test_ranks_are_those_of_the_modules_output_gradients() -> None:
    net = model()
    in_order = kept(after_a_coefficient_step(net, sharing="ranked"))
    x, seen = batch(6, seed=2), list[Tensor]()
    net.left_out.register_forward_hook(
        lambda _, __, output: output.register_hook(lambda g: seen.append(g.flatten(1).norm(dim=1))) and None
    )
    losses(net, x).mean().backward()
    w = torch.empty_like(in_order)
    w[seen[0].argsort()] = in_order
    check(gradients(net), weighted(net, x, w), ["left_out.weight", "left_out.bias"])


def test_weights_that_follow_samples_reach_them() -> None:
    net, x = model(), batch(6)
    preconditioner = attach(net, "index")
    losses(net, x, **{INDEX_COLUMN: torch.arange(6)}).mean().backward()
    preconditioner.step()
    net.zero_grad()
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    losses(net, x[order], **{INDEX_COLUMN: order}).mean().backward()
    w = preconditioner.policy.table.mean(0)[order]
    check(gradients(net), weighted(net, x[order], w / w.mean()), REST)


def test_a_coefficient_step_has_the_weights_of_the_one_before() -> None:
    net = model()
    preconditioner = attach(net, coefficient_steps=2)
    x = batch(6)
    losses(net, x).mean().backward()
    check(gradients(net), weighted(net, x, torch.ones(6)), REST)  # there are none before the first
    preconditioner.step()
    w = kept(preconditioner)
    net.zero_grad()
    x = batch(6, seed=2)
    losses(net, x).mean().backward()
    check(gradients(net), weighted(net, x, w), REST)


def test_an_outlier_is_small_there_too() -> None:
    net = model()
    after_a_coefficient_step(net, sharing="ranked")
    x = batch(6, seed=2)
    losses(net, x).mean().backward()
    found, plain = gradients(net), weighted(net, x, torch.ones(6))
    assert all(float(found[name].norm() / plain[name].norm()) < 0.5 for name in REST)


def test_another_batch_size_has_weights_too() -> None:
    net = model()
    preconditioner = after_a_coefficient_step(net)
    x = batch(4, seed=2)
    losses(net, x).mean().backward()
    w = preconditioner.policy.fit(preconditioner.policy.row, 4).mean(0)
    check(gradients(net), weighted(net, x, w), REST)


def test_a_table_of_as_many_positions_as_samples_is_none_of_samples() -> None:
    net = model()
    after_a_coefficient_step(net)
    x = batch(LENGTH, seed=2)
    losses(net, x).mean().backward()
    check(gradients(net), weighted(net, x, torch.ones(LENGTH)), PLAIN)


# What stays as it is ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sharing", "weigh_rest"), [("last", False), ("never", True), ("sketched", True)])
def test_the_rest_is_plain_without_it_and_where_no_weights_are_kept(sharing: str, weigh_rest: bool) -> None:
    net = model()
    preconditioner = attach(net, sharing, weigh_rest=weigh_rest)
    for seed in (1, 2):
        x = batch(6, seed)
        net.zero_grad()
        losses(net, x).mean().backward()
        preconditioner.step()
    check(gradients(net), weighted(net, x, torch.ones(6)), REST + PLAIN)


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
    check(gradients(net), weighted(net, x, torch.ones(6)), REST)


def test_frozen_parts_stay_frozen() -> None:
    net = model()
    net.left_out.bias.requires_grad_(False)
    net.positions.requires_grad_(False)
    after_a_coefficient_step(net)
    losses(net, batch(6, seed=2)).mean().backward()
    assert net.left_out.bias.grad is None
    assert net.positions.weight.grad is None
    assert net.left_out.weight.grad is not None


def test_detaching_gives_back_the_model() -> None:
    net = model()
    after_a_coefficient_step(net)
    assert type(copy.deepcopy(net.tokens)).__mro__[0] is nn.Embedding
    detach(net)
    assert type(net.tokens) is nn.Embedding
    assert type(net.head) is nn.Linear
    x = batch(6, seed=2)
    losses(net, x).mean().backward()
    check(gradients(net), weighted(net, x, torch.ones(6)), REST)


# In other modes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_makes_no_difference(reentrant: bool) -> None:
    found = []
    for checkpointing in (None, reentrant):
        net = model(checkpointing=checkpointing)
        after_a_coefficient_step(net, sharing="ranked")
        losses(net, batch(6, seed=2)).mean().backward()
        found.append(gradients(net))
    check(found[1], found[0], REST + PLAIN)


def test_micro_batches_add_up() -> None:
    net = model()
    w = kept(after_a_coefficient_step(net))
    expected = []
    for part in batch(12, seed=2).split(6):
        losses(net, part).mean().backward()
        expected.append(weighted(net, part, w))
    check(gradients(net), {name: expected[0][name] + expected[1][name] for name in REST}, REST)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("sharing", ["last", "ranked"])
def test_a_compiled_model_has_the_same_gradients(sharing: str) -> None:
    found = []
    for compiles in (False, True):
        net = model()
        preconditioner = attach(net, sharing, coefficient_steps=2)
        called = torch.compile(net, backend="aot_eager", fullgraph=True) if compiles else net
        for seed in (1, 2, 3):
            net.zero_grad()
            losses(called, batch(6, seed)).mean().backward()
            preconditioner.step()
        found.append(gradients(net))
    check(found[1], found[0], REST + PLAIN)
    assert preconditioner.coverage().weighed


def test_an_interrupted_run_goes_on_as_it_would_have() -> None:
    def train(net: nn.Module, optimizer: FNGD, seeds: range) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            losses(net, batch(6, seed)).mean().backward()
            optimizer.step()

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
    train(second, resumed, range(4, 9))
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name


def test_the_report_names_what_was_weighed() -> None:
    net = model()
    preconditioner = after_a_coefficient_step(net)
    assert preconditioner.coverage().weighed == ()
    losses(net, batch(6, seed=2)).mean().backward()
    report = preconditioner.coverage()
    assert report.weighed == ("left_out.weight", "left_out.bias", "tokens.weight", "head.weight")
    assert "positions.weight" in report.plain
    assert str(report).splitlines()[-1] == "  4 of the plain gradients with the samples' mean weights"
