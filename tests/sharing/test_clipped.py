"""Clipped: weights from norms, those of the oracle's per-sample gradients or the cheap ones."""

import math

import pytest
import torch
from torch import Tensor, nn

from hf_fngd import FNGD, FNGDPreconditioner
from tests.nets import LAYER_NAMES, LAYERS, data, dense, fresh_weights, gradient, loss, net, relative_error, train
from tests.sharing.engine import L, fetch, info, prepared


def clipped(norms: list[float]) -> Tensor:
    """The definition, number by number."""
    bound = sum(norms) / len(norms)
    w = [1.0 if norm <= bound else bound / norm for norm in norms]
    return torch.tensor([x * len(w) / sum(w) for x in w], dtype=torch.float64)


def fetched(norms: Tensor) -> Tensor:
    policy = prepared("clipped")
    return fetch(policy, norms.expand(L, -1), info(len(norms)))[0]


@pytest.mark.parametrize("size", [1, 2, 3, 8, 13])
def test_norms_above_the_mean_are_brought_down_to_it(size: int) -> None:
    norms = torch.rand(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    found = fetched(norms)
    torch.testing.assert_close(found, clipped(norms.tolist()))
    weighted = norms * found
    above = int((norms > norms.mean()).sum())
    assert int((weighted > weighted.max() * (1 - 1e-9)).sum()) == max(above, 1)


@pytest.mark.parametrize("factor", [1e2, 1e4, 1e30])
def test_one_sample_keeps_an_nth_of_its_lead(factor: float) -> None:
    norms = torch.ones(64, dtype=torch.float64)
    norms[3] = factor
    weighted = norms * fetched(norms)
    assert float(weighted[3] / weighted[0]) == pytest.approx(factor / 64, rel=64 / factor)


def test_samples_without_a_gradient_do_no_harm() -> None:
    assert torch.equal(fetched(torch.zeros(4, dtype=torch.float64)), torch.ones(4, dtype=torch.float64))
    found = fetched(torch.tensor([0.0, 0.0, 0.0, 8.0], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([1, 1, 1, 0.25], dtype=torch.float64) * 4 / 3.25)


def test_a_norm_that_is_no_number_is_not_hidden() -> None:
    assert not fetched(torch.tensor([1.0, math.nan, 2.0])).isfinite().all()
    assert not fetched(torch.tensor([1.0, math.inf, math.inf])).isfinite().all()


def test_a_coefficient_step_has_the_ratio_of_its_gradient() -> None:
    u = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = prepared("clipped").solve(6 * u.T @ u, 0.01)
    w = clipped(u.norm(dim=0).tolist())
    torch.testing.assert_close(found.w, w)
    torch.testing.assert_close(found.rho, torch.linalg.matrix_norm(6 * u.T @ u) / (u @ w).square().sum())
    unusable = prepared("clipped").solve(torch.full((3, 3), math.nan), 0.01)
    assert torch.equal(unusable.w, torch.ones(3))
    assert unusable.rho.isnan()


@pytest.mark.parametrize(("layer_type", "bias"), LAYERS)
@pytest.mark.parametrize("between", [(), (3,)])
def test_gradients_are_the_oracles_in_both_kinds_of_steps(layer_type: str, bias: str, between: tuple[int, ...]) -> None:
    model = net(layer_type=layer_type, bias=bias)
    batches = [data(7, *between, seed=1), data(5, *between, seed=2)]
    expected = [dense(net(layer_type=layer_type, bias=bias), x, y, 1.0) for x, y in batches]
    preconditioner = FNGDPreconditioner(model, sharing="clipped", refresh=0, coefficient_steps=1)
    cheap: dict[nn.Module, Tensor] = {}

    def watch(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        a = inputs[0].flatten(1).norm(dim=1)
        output.register_hook(lambda g: cheap.__setitem__(module, a * g.flatten(1).norm(dim=1)))

    for name in LAYER_NAMES:
        model.get_submodule(name).register_forward_hook(watch)
    for step, ((x, y), exact) in enumerate(zip(batches, expected, strict=True)):
        model.zero_grad()
        loss(model, x, y).backward()
        for place, name in enumerate(LAYER_NAMES):
            layer = model.get_submodule(name)
            w = clipped((exact[name].u.norm(dim=0) if step == 0 else cheap[layer]).tolist())
            if step == 0:
                torch.testing.assert_close(fresh_weights(preconditioner)[place], w)
            assert relative_error(gradient(layer), exact[name].u @ w / len(x)) < 1e-9
        preconditioner.step()
    assert preconditioner.coverage().missed == {}


@pytest.mark.parametrize("weigh_rest", [True, False])
def test_embeddings_go_by_their_own_output_gradients(weigh_rest: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(12, 4)).double()
    table = model[0]
    FNGDPreconditioner(model, sharing="clipped", weigh_rest=weigh_rest, coefficient_steps=1)
    outputs: list[Tensor] = []
    table.register_forward_hook(lambda module, inputs, y: outputs.append(y))
    x, y = torch.randint(9, (7, 2)), torch.randint(4, (7,))
    each = nn.functional.cross_entropy(model(x), y, reduction="none")
    outputs[0].retain_grad()
    (each * torch.tensor([100.0, 1, 1, 1, 1, 1, 1])).mean().backward()
    g = outputs[0].grad
    w = clipped(g.flatten(1).norm(dim=1).tolist()) if weigh_rest else torch.ones(7, dtype=torch.float64)
    expected = torch.zeros(9, 6, dtype=torch.float64).index_add(0, x.flatten(), (g * w[:, None, None]).flatten(0, 1))
    torch.testing.assert_close(table.weight.grad, expected)


def test_there_is_nothing_to_store() -> None:
    model = net()
    optimizer = FNGD(model, sharing="clipped", refresh=3, coefficient_steps=2)
    train(model, optimizer, steps=4)
    assert optimizer.preconditioner.policy.state_dict() == {}


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**16])
def test_the_scale_of_the_loss_does_not_matter(scale: float) -> None:
    found = []
    for factor in (1.0, scale):
        model = net(dtype=torch.float32)
        preconditioner = FNGDPreconditioner(model, sharing="clipped", refresh=0, coefficient_steps=1)
        for step in range(2):
            model.zero_grad()
            (factor * loss(model, *data(7, 3, seed=step, dtype=torch.float32))).backward()
            preconditioner.step()
        found.append(torch.cat([gradient(model.get_submodule(name)) / factor for name in LAYER_NAMES]))
    assert torch.equal(*found)
