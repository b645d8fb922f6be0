"""Weights outside of the preconditioned layers: embeddings, norms and tied heads (``weigh_rest``)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hf_fngd import FNGD, FNGDPreconditioner, detach
from hf_fngd.sharing import INDEX_COLUMN

VOCABULARY, LENGTH, WIDTH = 11, 3, 4
REST = ["tokens.weight", "norm.weight", "norm.bias", "scale.weight"]
POSITIONS = "positions.weight"


class ScaleNorm(nn.Module):
    """A norm as models bring their own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / x.norm(dim=-1, keepdim=True)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + torch.tanh(self.fc(x)))


class LanguageModel(Block):
    """Two tables, a Linear layer, two kinds of norms, and a head that shares the tokens' table."""

    def __init__(self, checkpointing: bool | None = None) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.tokens = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.scale = ScaleNorm()
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.tokens(x) + self.positions(torch.arange(LENGTH))
        if self.checkpointing is None:
            y = super().forward(y)
        else:
            y = checkpoint(super().forward, y, use_reentrant=self.checkpointing)
        return self.head(self.scale(y))


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


def after_a_coefficient_step(net: nn.Module, sharing: str = "last", **kwargs: Any) -> FNGDPreconditioner:
    """A preconditioner whose next step is a shared one."""
    preconditioner = FNGDPreconditioner(
        net, 0.1, sharing=sharing, coefficient_steps=1, refresh=0, weigh_rest=True, **kwargs
    )
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
    preconditioner = after_a_coefficient_step(net)
    w = kept(preconditioner)
    assert float(w.min()) < 0.5
    x = batch(6, seed=2)
    total = losses(net, x).mean()
    for time in range(times):
        total.backward(retain_graph=time + 1 < times)
    expected, plain = weighted(net, x, w), weighted(net, x, torch.ones(6))
    found = gradients(net)
    for name in REST:
        torch.testing.assert_close(found[name], times * expected[name], rtol=1e-12, atol=1e-14)
        assert not torch.allclose(found[name], times * plain[name], rtol=0.01)
    torch.testing.assert_close(found[POSITIONS], times * plain[POSITIONS], rtol=1e-12, atol=1e-14)


def test_ranks_are_those_of_the_modules_output_gradients() -> None:
    net = model()
    preconditioner = after_a_coefficient_step(net, sharing="ranked")
    in_order = kept(preconditioner)
    x = batch(6, seed=2)
    seen: dict[str, Tensor] = {}

    def watch(name: str, output: Tensor) -> None:
        output.register_hook(lambda g: seen.update({name: g.flatten(1).norm(dim=1)}))

    for name in ("norm", "scale"):
        net.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: watch(name, output))
    losses(net, x).mean().backward()
    for name in ("norm", "scale"):
        w = torch.empty_like(in_order)
        w[seen[name].argsort()] = in_order
        expected = weighted(net, x, w)[f"{name}.weight"]
        torch.testing.assert_close(net.get_parameter(f"{name}.weight").grad, expected, rtol=1e-12, atol=1e-14)


def test_weights_that_follow_samples_reach_them() -> None:
    net, x = model(), batch(6)
    preconditioner = FNGDPreconditioner(net, 0.1, sharing="index", coefficient_steps=1, refresh=0, weigh_rest=True)
    losses(net, x, **{INDEX_COLUMN: torch.arange(6)}).mean().backward()
    preconditioner.step()
    net.zero_grad()
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    losses(net, x[order], **{INDEX_COLUMN: order}).mean().backward()
    w = preconditioner.policy.table.mean(0)[order]
    expected = weighted(net, x[order], w / w.mean())
    for name in REST:
        torch.testing.assert_close(gradients(net)[name], expected[name], rtol=1e-12, atol=1e-14)


def test_a_coefficient_step_has_the_weights_of_the_one_before() -> None:
    net = model()
    preconditioner = FNGDPreconditioner(net, 0.1, sharing="last", coefficient_steps=2, weigh_rest=True)
    x = batch(6)
    losses(net, x).mean().backward()
    plain = weighted(net, x, torch.ones(6))
    for name in REST:  # there are none before the first
        torch.testing.assert_close(gradients(net)[name], plain[name])
    preconditioner.step()
    w = kept(preconditioner)
    net.zero_grad()
    x = batch(6, seed=2)
    losses(net, x).mean().backward()
    expected = weighted(net, x, w)
    for name in REST:
        torch.testing.assert_close(gradients(net)[name], expected[name], rtol=1e-12, atol=1e-14)


def test_an_outlier_is_small_everywhere() -> None:
    net = model()
    after_a_coefficient_step(net, sharing="ranked")
    x = batch(6, seed=2)
    losses(net, x).mean().backward()
    found, plain = gradients(net), weighted(net, x, torch.ones(6))
    for name in REST:
        assert float(found[name].norm() / plain[name].norm()) < 0.5


# What stays as it is ------------------------------------------------------------------------------------------


def test_without_it_the_rest_is_plain() -> None:
    net, x = model(), batch(6)
    preconditioner = FNGDPreconditioner(net, 0.1, sharing="last", coefficient_steps=1)
    for seed in (1, 2):
        x = batch(6, seed)
        net.zero_grad()
        losses(net, x).mean().backward()
        preconditioner.step()
    plain = weighted(net, x, torch.ones(6))
    for name in (*REST, POSITIONS):
        torch.testing.assert_close(gradients(net)[name], plain[name], rtol=1e-12, atol=1e-14)


def test_equal_weights_change_nothing() -> None:
    found = []
    for weigh_rest in (False, True):
        net = model()
        preconditioner = FNGDPreconditioner(net, sharing="uniform", coefficient_steps=1, weigh_rest=weigh_rest)
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


def test_evaluation_and_no_grad_pass_it_by() -> None:
    net, x = model(), batch(6)
    after_a_coefficient_step(net)
    with torch.no_grad():
        assert net(x).grad_fn is None
    net.eval()
    losses(net, x).mean().backward()
    plain = weighted(net, x, torch.ones(6))
    torch.testing.assert_close(gradients(net)["norm.weight"], plain["norm.weight"])


def test_frozen_parts_stay_frozen() -> None:
    net = model()
    net.norm.bias.requires_grad_(False)
    net.scale.requires_grad_(False)
    after_a_coefficient_step(net)
    losses(net, batch(6, seed=2)).mean().backward()
    assert net.norm.bias.grad is None
    assert net.scale.weight.grad is None
    assert net.norm.weight.grad is not None


def test_detaching_gives_back_the_model() -> None:
    net = model()
    after_a_coefficient_step(net)
    assert type(copy.deepcopy(net.norm)) is nn.LayerNorm
    detach(net)
    assert type(net.norm) is nn.LayerNorm
    assert type(net.tokens) is nn.Embedding
    x = batch(6, seed=2)
    net.zero_grad()
    losses(net, x).mean().backward()
    torch.testing.assert_close(gradients(net)["norm.weight"], weighted(net, x, torch.ones(6))["norm.weight"])


# In other modes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_makes_no_difference(reentrant: bool) -> None:
    found = []
    for checkpointing in (None, reentrant):
        net = model(checkpointing=checkpointing)
        after_a_coefficient_step(net, sharing="ranked")
        losses(net, batch(6, seed=2)).mean().backward()
        found.append(gradients(net))
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-12, atol=1e-14)


def test_micro_batches_add_up() -> None:
    net = model()
    w = kept(after_a_coefficient_step(net))
    whole, expected = batch(12, seed=2), []
    parts = whole.split(6)
    for part in parts:
        losses(net, part).mean().backward()
        expected.append(weighted(net, part, w))
    for name in REST:
        torch.testing.assert_close(gradients(net)[name], sum(e[name] for e in expected), rtol=1e-12, atol=1e-14)


def test_another_batch_size_has_weights_too() -> None:
    net = model()
    preconditioner = after_a_coefficient_step(net)
    x = batch(4, seed=2)
    losses(net, x).mean().backward()
    w = kept(preconditioner)[:4]
    expected = weighted(net, x, w / w.mean().clamp(min=0.5) + (1 - w.mean() / w.mean().clamp(min=0.5)))
    for name in REST:
        torch.testing.assert_close(gradients(net)[name], expected[name], rtol=1e-12, atol=1e-14)


def test_an_interrupted_run_goes_on_as_it_would_have() -> None:
    def train(net: nn.Module, optimizer: FNGD, seeds: range) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            losses(net, batch(6, seed)).mean().backward()
            optimizer.step()

    def make() -> tuple[nn.Module, FNGD]:
        net = model()
        return net, FNGD(net, weigh_rest=True, coefficient_steps=3, refresh=2)

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


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own
def test_a_compiled_model_is_plain_there() -> None:
    net, x = model(), batch(6, seed=2)
    preconditioner = after_a_coefficient_step(net)
    torch.compile(net, backend="aot_eager")(x).square().mean().backward()
    found = gradients(net)
    net.zero_grad()
    plain = copy.deepcopy(net)
    plain(x).square().mean().backward()
    for name in REST:
        torch.testing.assert_close(found[name], gradients(plain)[name])
    assert preconditioner.coverage().weighed == ()


# What is said of it -------------------------------------------------------------------------------------------


def test_the_report_names_what_was_weighed() -> None:
    net = model()
    preconditioner = after_a_coefficient_step(net)
    assert preconditioner.coverage().weighed == ()
    losses(net, batch(6, seed=2)).mean().backward()
    report = preconditioner.coverage()
    assert report.weighed == ("norm.weight", "norm.bias", "tokens.weight", "scale.weight", "head.weight")
    assert POSITIONS in report.plain
    assert str(report).splitlines()[-1] == "  5 of the plain gradients with the samples' mean weights"


@pytest.mark.parametrize("sharing", ["never", "sketched"])
def test_policies_that_keep_nothing_are_refused(sharing: str) -> None:
    with pytest.raises(ValueError, match=f"sharing='{sharing}' keeps none: use sharing=\"ranked\""):
        FNGD(model(), sharing=sharing, weigh_rest=True)
