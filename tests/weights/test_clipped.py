"""Clipped: weights from norms, those of the oracle's per-sample gradients or the cheap ones."""

import math

import pytest
import torch
from torch import Tensor, nn

from hf_fngd import FNGD, FNGDPreconditioner
from tests.nets import LAYER_NAMES, LAYERS, data, dense, gradient, loss, net, relative_error, train
from tests.sharing.engine import prepared


def clipped(norms: list[float]) -> Tensor:
    """The definition, number by number."""
    bound = sum(norms) / (sum(norm > 0 for norm in norms) or 1)
    return torch.tensor([1.0 if norm <= bound else bound / norm for norm in norms], dtype=torch.float64)


def fetched(norms: Tensor) -> Tensor:
    found = prepared("clipped").weigh(norms, 0)
    assert found is not None
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 8, 13])
def test_norms_above_the_mean_are_brought_down_to_it(size: int) -> None:
    norms = torch.rand(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    found = fetched(norms)
    torch.testing.assert_close(found, clipped(norms.tolist()))
    weighted = norms * found
    assert float(weighted.max()) == pytest.approx(float(norms.mean()))
    assert torch.equal(weighted[norms < norms.mean()], norms[norms < norms.mean()])


@pytest.mark.parametrize("factor", [1e2, 1e4, 1e30])
def test_one_sample_keeps_an_nth_of_its_lead(factor: float) -> None:
    norms = torch.ones(64, dtype=torch.float64)
    norms[3] = factor
    weighted = norms * fetched(norms)
    assert float(weighted[3] / weighted[0]) == pytest.approx(1 + (factor - 1) / 64)


def test_samples_without_a_gradient_do_no_harm() -> None:
    assert torch.equal(fetched(torch.zeros(4, dtype=torch.float64)), torch.ones(4, dtype=torch.float64))
    found = fetched(torch.tensor([0.0, 2.0, 0.0, 6.0], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([1, 1, 1, 4 / 6], dtype=torch.float64))


def test_a_norm_that_is_no_number_is_not_hidden() -> None:
    assert not fetched(torch.tensor([1.0, math.nan, 2.0])).isfinite().all()
    assert not fetched(torch.tensor([1.0, math.inf, math.inf])).isfinite().all()


@pytest.mark.parametrize(("layer_type", "bias"), LAYERS)
@pytest.mark.parametrize("between", [(), (3,)])
def test_gradients_are_the_oracles_in_both_kinds_of_steps(layer_type: str, bias: str, between: tuple[int, ...]) -> None:
    model = net(layer_type=layer_type, bias=bias)
    batches = [data(7, *between, seed=1), data(5, *between, seed=2)]
    expected = [dense(net(layer_type=layer_type, bias=bias), x, y, 1.0) for x, y in batches]
    preconditioner = FNGDPreconditioner(model, sharing="clipped", refresh=0, coefficient_steps=1)
    cheap: dict[nn.Module, Tensor] = {}

    def watch(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        ones = module.bias is not None and module.bias.requires_grad
        a = (inputs[0].square().sum(dim=-1) + ones).view(len(inputs[0]), -1).sum(dim=1).sqrt()
        output.register_hook(lambda g: cheap.__setitem__(module, a * g.flatten(1).norm(dim=1)))

    for name in LAYER_NAMES:
        model.get_submodule(name).register_forward_hook(watch)
    for step, ((x, y), exact) in enumerate(zip(batches, expected, strict=True)):
        model.zero_grad()
        loss(model, x, y).backward()
        for place, name in enumerate(LAYER_NAMES):
            layer = model.get_submodule(name)
            w, u = clipped(cheap[layer].tolist()), exact[name].u
            if not between:
                torch.testing.assert_close(cheap[layer] * len(x), u.norm(dim=0))
            if step == 0:  # a coefficient step, which measures rho
                (batch,) = preconditioner._window._batches
                assert batch.fresh is not None
                assert batch.rho is not None
                torch.testing.assert_close(batch.fresh[place], w)
                rho = len(x) * torch.linalg.matrix_norm(u.T @ u) / (u @ w).square().sum()
                torch.testing.assert_close(batch.rho[place], rho)
            assert relative_error(gradient(layer), u @ w / len(x)) < 1e-9
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


def test_of_steps_in_one_micro_batch_nothing_is_kept() -> None:
    model = net()
    optimizer = FNGD(model, sharing="clipped", refresh=3, coefficient_steps=2)
    train(model, optimizer, steps=4)
    assert optimizer.preconditioner.policy.state_dict()["means"].count_nonzero() == 0


def test_no_step_forms_a_gram_matrix_unless_rho_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr("hf_fngd.backward.gram", refuse)
    model = net()
    optimizer = FNGD(model)
    train(model, optimizer, steps=60)
    found = optimizer.diagnostics()
    assert set(found) == {"phase", "weight_spread", "skipped"}
    assert found["phase"] == 1
    for asked in ({"refresh": 2}, {"coefficient_steps": 1}, {"update": "momentum"}):
        model = net()
        with pytest.raises(AssertionError):
            train(model, FNGD(model, **asked), steps=2)


def test_the_spread_in_the_log_is_that_of_the_last_batch() -> None:
    model = net()
    optimizer = FNGD(model, lr=0)
    for scale in (1.0, 1e4):
        x, y = data(7)
        x[3] *= scale
        loss(model, x, y).backward()
        optimizer.step()
        exact = dense(net(), x, y, 1.0)
        w = torch.stack([clipped(exact[name].u.norm(dim=0).tolist()) for name in LAYER_NAMES])
        expected = (w.var(dim=1, correction=0) / w.mean(dim=1).square()).mean().sqrt()
        assert optimizer.diagnostics()["weight_spread"] == pytest.approx(float(expected))


def test_a_sample_without_inputs_is_clipped_at_its_bias() -> None:
    """Its weight gradient is 0, its bias gradient is not: the norm counts both."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4)).double()
    FNGDPreconditioner(model)
    x, y = torch.randn(7, 6, dtype=torch.float64), torch.randint(4, (7,))
    x[0] = 0
    outputs = model(x)
    outputs.retain_grad()
    each = nn.functional.cross_entropy(outputs, y, reduction="none")
    (each * torch.tensor([1e4, 1, 1, 1, 1, 1, 1])).mean().backward()
    norms = outputs.grad.norm(dim=1) * (x.square().sum(dim=1) + 1).sqrt()
    torch.testing.assert_close(model[0].bias.grad, clipped(norms.tolist()) @ outputs.grad)


def test_steps_stay_on_the_models_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, since a test has no other beside the CPU: what mixes the two fails there as on CUDA."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device=None: False)  # unknown for meta tensors
    model = nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(12, 4)).to("meta")
    preconditioner = FNGDPreconditioner(model)
    for _ in range(3):
        model(torch.zeros(7, 2, dtype=torch.long, device="meta")).sum().backward()
        preconditioner.step()
    assert len(preconditioner.coverage().weighed) == 1


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
