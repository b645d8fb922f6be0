"""Clipped: sample weights from norms, those of the oracle's per-sample gradients or the cheap ones."""

import math

import pytest
import torch
from torch import Tensor, nn

from hf_fngd import FNGD, FNGDPreconditioner
from tests.nets import EVERY_TYPE, LAYER_NAMES, data, dense, gradient, loss, net, train
from tests.weights.harness import of_norms, prepared, step


def clipped(norms: list[float]) -> Tensor:
    """The definition, number by number."""
    bound = sum(norms) / (sum(norm > 0 for norm in norms) or 1)
    return torch.tensor([1.0 if norm <= bound else bound / norm for norm in norms], dtype=torch.float64)


def weighed(*norms: float) -> Tensor:
    return step(prepared("clipped", layers=1), of_norms(norms))[0][0]


@pytest.mark.parametrize("size", [1, 2, 3, 8, 13])
def test_norms_above_the_mean_are_brought_down_to_it(size: int) -> None:
    norms = torch.rand(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    found = weighed(*norms.tolist())
    torch.testing.assert_close(found, clipped(norms.tolist()))
    weighted = norms * found
    assert float(weighted.max()) == pytest.approx(float(norms.mean()))
    assert torch.equal(weighted[norms < norms.mean()], norms[norms < norms.mean()])


@pytest.mark.parametrize("factor", [1e2, 1e4, 1e30])
def test_one_sample_keeps_an_nth_of_its_lead(factor: float) -> None:
    norms = torch.ones(64, dtype=torch.float64)
    norms[3] = factor
    weighted = norms * weighed(*norms.tolist())
    assert float(weighted[3] / weighted[0]) == pytest.approx(1 + (factor - 1) / 64)


def test_samples_without_a_gradient_have_no_part_in_the_mean() -> None:
    torch.testing.assert_close(weighed(0.0, 2.0, 0.0, 6.0), torch.tensor([1, 1, 1, 4 / 6], dtype=torch.float64))


@pytest.mark.parametrize("bad", [(math.nan, 2.0), (math.inf, math.inf)])
def test_a_norm_that_is_no_number_is_not_hidden(bad: tuple[float, float]) -> None:
    assert not weighed(1.0, *bad).isfinite().all()


def test_of_steps_in_one_micro_batch_nothing_is_kept() -> None:
    model = net()
    optimizer = FNGD(model)
    train(model, optimizer, steps=4)
    assert optimizer.preconditioner.policy.state_dict()["means"].count_nonzero() == 0


def test_no_step_forms_a_gram_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr("hf_fngd.layers.linear.gram", refuse)
    model = net()
    optimizer = FNGD(model)
    train(model, optimizer, steps=9)
    assert set(optimizer.diagnostics()) == {"weight_spread", "skipped"}
    with pytest.raises(AssertionError):
        train(model := net(), FNGD(model, sharing="never"), steps=1)


def test_the_spread_in_the_log_is_that_of_the_last_batch() -> None:
    model = net()
    optimizer = FNGD(model, lr=0)
    assert optimizer.diagnostics()["weight_spread"] == 0
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
    _kept = FNGDPreconditioner(model)
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
    layers = nn.Embedding(9, 6), nn.RMSNorm(6), nn.LayerNorm(6), nn.Conv1d(2, 2, 1), nn.Flatten(), nn.Linear(12, 4)
    model = nn.Sequential(*layers).to("meta")
    preconditioner = FNGDPreconditioner(model, layer_types=EVERY_TYPE)
    for _ in range(3):
        model(torch.zeros(7, 2, dtype=torch.long, device="meta")).sum().backward()
        preconditioner.step()
    assert len(preconditioner.coverage().weighed) == 6


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**16])
def test_the_scale_of_the_loss_does_not_matter(scale: float) -> None:
    found = []
    for factor in (1.0, scale):
        model = net(dtype=torch.float32)
        preconditioner = FNGDPreconditioner(model, layer_types=EVERY_TYPE)
        for seed in range(2):
            model.zero_grad()
            (factor * loss(model, *data(7, 3, seed=seed, dtype=torch.float32))).backward()
            preconditioner.step()
        found.append(gradient(model) / factor)
    assert torch.equal(*found)
