"""What one backward pass does to p.grad, against the dense Fisher matrix, and what must not go wrong in it."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_fngd import FNGDPreconditioner, policy_names
from hf_fngd.engine.reasons import USED_ELSEWHERE
from tests.nets import FEATURES, LAYER_NAMES, LAYERS, Checkpointed, Net, data, layer, loss, net, settings_of, trained
from tests.reference import Dense, per_sample_gradients
from tests.steps import Watched, dense, gradient, one_step, relative_error, with_engine
from tests.weights.samples import Layer, budgets, layers

DAMPINGS = [1e-3, 1e-2, 0.1, 1.0, 30.0]
# What lies between the batch and the features: inputs of 2, 3 and 4 dimensions.
BETWEEN = [(), (3,), (2, 2)]


def test_a_pass_that_asks_for_biases_alone_gives_them() -> None:
    plain = net()
    model = copy.deepcopy(plain)
    preconditioner = FNGDPreconditioner(model, sharing="uniform")
    x = data(5)[0]
    for each in (model, plain):
        biases = [p for name, p in each.named_parameters() if name.endswith("bias")]
        found = torch.autograd.grad(each(x).square().sum(), biases)
        each(x).square().sum().backward(inputs=biases)
        for bias, g in zip(biases, found, strict=True):
            torch.testing.assert_close(bias.grad, g)
        assert all(p.grad is None for name, p in each.named_parameters() if name.endswith("weight"))
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    preconditioner.detach()


# The oracle ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize(("layer_type", "bias"), LAYERS)
def test_the_gradient_is_the_damped_natural_gradient(
    layer_type: str, bias: str, between: tuple[int, ...], damping: float
) -> None:
    model, (x, y) = net(layer_type=layer_type, bias=bias), data(7, *between)
    exact = dense(model, x, y, damping)
    plain = torch.autograd.grad(loss(model, x, y), list(model.norm.parameters()))
    policy = Watched()
    preconditioner = FNGDPreconditioner(model, damping=damping, sharing=policy)
    loss(model, x, y).backward()
    weights = policy.w
    preconditioner.step()
    for place, name in enumerate(LAYER_NAMES):
        assert relative_error(gradient(model.get_submodule(name)), exact[name].natural_gradient()) < 1e-9
        assert relative_error(weights[place], exact[name].w) < 1e-9
        assert relative_error(policy.rho[place], exact[name].rho) < 1e-9
    for p, expected in zip(model.norm.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=0)


# Of what the terms of the weighted sum add up to where they do not cancel.
WHOLE = {torch.float64: 1e-11, torch.float32: 3e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


@given(layers(), st.sampled_from(LAYERS), st.floats(-2, 3).map(lambda exponent: 10.0**exponent), budgets)
def test_any_layer_finds_the_natural_gradient(of: Layer, kind: tuple[str, str], damping: float, budget: int) -> None:
    dtype, samples = of.a.dtype, len(of.a)
    module = layer(*kind, of.a.shape[-1], of.g.shape[-1]).to(dtype)
    plain = copy.deepcopy(module).double()

    def alone(model: nn.Module, n: int) -> Tensor:
        return samples * (model(of.a[n : n + 1].double()) * of.g[n : n + 1].double()).sum()

    exact = Dense(per_sample_gradients(plain, trained(plain), alone, samples), damping)
    engine = FNGDPreconditioner(module, damping=damping, sharing="never", memory_budget=budget)
    if of.a.shape[1] == samples > 1:  # which leaves open which dimension is the batch's: another batch tells
        module(of.a[:1].expand(samples + 1, -1, -1)).sum().backward()
        engine.step()
        module.zero_grad()
    # Linear in the output: the output gradient is g, without a rounding.
    module(of.a).backward(of.g)
    expected = exact.p if exact.u.any() else exact.u.mean(dim=1)
    size = float((exact.u.norm(dim=0) * exact.w.abs()).mean()) if exact.u.any() else 0.0
    terms = size * math.sqrt(of.a.shape[1])
    assert (gradient(module) - expected).norm() <= WHOLE[dtype] * terms + torch.finfo(dtype).tiny
    engine.step()
    assert engine.coverage().missed == {}
    assert torch.isfinite(engine.policy.spread).all()


@pytest.mark.parametrize("sharing", policy_names())
def test_the_input_gets_the_plain_gradient(sharing: str) -> None:
    model, (x, y) = net(), data(7, 3)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(loss(model, x, y), x)
    _kept = FNGDPreconditioner(model, sharing=sharing)
    loss(model, x, y).backward()
    assert torch.equal(x.grad, expected)


def test_huge_damping_is_sgd() -> None:
    trajectories = []
    for attached in (True, False):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if attached:
            FNGDPreconditioner(model, damping=1e12, sharing="never").follow(optimizer)
        for step in range(20):
            one_step(model, optimizer, *data(7, 3, seed=step))
        trajectories.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*trajectories, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("sharing", policy_names())
def test_sample_weights_belong_to_one_backward_pass(sharing: str) -> None:
    """Two losses of one graph, one after the other, each as if it were alone; and the gradient of an input before."""
    model, alone, other = net(), net(), net()
    preconditioners = [FNGDPreconditioner(of, sharing=sharing) for of in (model, alone, other)]
    factors = [torch.ones(6, dtype=torch.float64), torch.tensor([1.0, 1, 1, 1, 1, 100], dtype=torch.float64)]
    for seed in range(1 if sharing == "replay" else 2):  # whose shared steps have the first losses' weights
        x, y = data(6, 3, seed=seed)
        expected = []
        for of, factor in zip((alone, other), factors, strict=True):
            of.zero_grad()
            (F.cross_entropy(of(x), y, reduction="none") * factor).sum().backward()
            expected.append(gradient(of))
        model.zero_grad()
        x.requires_grad_()
        each = F.cross_entropy(model(x), y, reduction="none")
        torch.autograd.grad((each**2).sum(), x, retain_graph=True)
        assert all(p.grad is None for p in model.parameters())
        (each * factors[0]).sum().backward(retain_graph=True)
        first = gradient(model)
        (each * factors[1]).sum().backward()
        torch.testing.assert_close(first, expected[0], rtol=0, atol=0)
        torch.testing.assert_close(gradient(model), sum(expected))
        for preconditioner in preconditioners:
            preconditioner.step()
    assert preconditioners[0].coverage().missed == {}
    if sharing != "uniform":
        assert preconditioners[0].diagnostics() == preconditioners[1].diagnostics()


# Scale of the loss and of the batch ------------------------------------------------------------------------


@pytest.mark.parametrize("power", [-40, 16])
@pytest.mark.parametrize("sharing", policy_names())
def test_powers_of_two_in_the_loss_change_no_bit(sharing: str, power: int) -> None:
    found = []
    for scale in (1.0, 2.0**power):
        model, preconditioner = with_engine(net(dtype=torch.float32), **settings_of(sharing, coefficient_steps=1))
        for seed in range(2):
            model.zero_grad()
            (scale * loss(model, *data(7, 3, seed=seed, dtype=torch.float32))).backward()
            preconditioner.step()
        found.append(gradient(model) / scale)
    assert torch.equal(*found)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-3, 1e3, 1e20, 1e30])
def test_other_scales_leave_the_weights_to_rounding(scale: float) -> None:
    found = []
    for factor in (1.0, scale):
        model, policy = net(dtype=torch.float32), Watched()
        preconditioner = FNGDPreconditioner(model, damping=0.01, sharing=policy)
        (factor * loss(model, *data(7, 3, dtype=torch.float32))).backward()
        preconditioner.step()
        found.append(torch.cat([policy.w, policy.rho[:, None]], dim=1))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sharing", policy_names())
@pytest.mark.parametrize("x", [torch.zeros(0, FEATURES), torch.zeros(0, 3, FEATURES), torch.zeros(4, 0, FEATURES)])
def test_empty_batches_pass_through(x: Tensor, sharing: str) -> None:
    model, preconditioner = with_engine(sharing=sharing)
    model.fc1(x.double()).sum().backward()
    model(x.double()).nansum().backward()
    preconditioner.step()
    assert torch.equal(model.fc1.weight.grad, torch.zeros_like(model.fc1.weight))


# Other ways to run a model ---------------------------------------------------------------------------------


# The last one is plain: see tests/engine/test_tables_in_modes.py.
WAYS = [way for way in itertools.product([False, True], repeat=3) if way != (False, True, True)]


class CheckpointedElsewhere(Net):
    """Uses a layer's weight outside of its forward, within what checkpointing recomputes."""

    def body(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.fc2.weight.sum(1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.body, x, use_reentrant=False)
        return y


def test_checkpointing_recomputes_a_layer_whose_weight_turns_out_to_be_used_elsewhere() -> None:
    model, (x, y) = net(cls=CheckpointedElsewhere), data(7, 3)
    expected = torch.autograd.grad(loss(model, x, y), [*model.fc2.parameters()])
    preconditioner = FNGDPreconditioner(model)
    for _ in range(2):
        model.zero_grad()
        one_step(model, preconditioner, x, y)
        found = [p.grad for p in model.fc2.parameters()]
        torch.testing.assert_close(found, [*expected], rtol=1e-12, atol=1e-14)
    assert preconditioner.coverage().missed == dict.fromkeys(("fc2.weight", "fc2.bias"), USED_ELSEWHERE)


@pytest.mark.parametrize(("whole", "reentrant", "together"), WAYS)
@pytest.mark.parametrize("sharing", ["never", "replay", "clipped"])
def test_activation_checkpointing_gives_the_same_gradient(
    sharing: str, whole: bool, reentrant: bool, together: bool
) -> None:
    """Of parts of the model or all of it, with one or two forward passes before a backward pass."""
    found = []
    for cls in (Net, Net if whole else Checkpointed):
        model = net(cls=cls)
        model.reentrant = reentrant
        recomputes = whole and bool(found)
        called = (lambda x, model=model: checkpoint(model, x, use_reentrant=reentrant)) if recomputes else model
        preconditioner = FNGDPreconditioner(model, **settings_of(sharing, coefficient_steps=1))
        for seed in range(2):
            model.zero_grad()
            x, y = data(7, 3, seed=seed)
            parts = (x, x + 1) if together else (x,)
            sum(F.cross_entropy(called(part.requires_grad_()), y) for part in parts).backward()
            preconditioner.step()
        assert preconditioner.coverage().missed == {}
        found.append(gradient(model))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_autocast_leaves_float64_alone() -> None:
    model, plain, (x, _) = net(), net(), data(7, 3)
    _kept = FNGDPreconditioner(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert plain(x).dtype == torch.float64
        assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_have_weights_in_float32(dtype: torch.dtype) -> None:
    model, (x, y) = net(dtype=dtype), data(7, 3, dtype=dtype)
    exact = dense(copy.deepcopy(model).double(), x.double(), y, 0.1)
    policy = Watched()
    _kept = FNGDPreconditioner(model, damping=0.1, sharing=policy)
    loss(model, x, y).backward()
    assert policy.w.dtype == torch.float32
    for place, name in enumerate(LAYER_NAMES):
        assert model.get_submodule(name).weight.grad.dtype == dtype
        assert relative_error(policy.w[place].double(), exact[name].w) < 0.05
