"""Clipped: sample weights from norms, those of the oracle's per-sample gradients or the cheap ones."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_fngd import FNGD, FNGDPreconditioner
from tests.nets import EVERY_TYPE, LAYER_NAMES, data, loss, net
from tests.steps import dense, gradient, one_step, relative_error, train, with_engine, with_fngd
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


def test_a_state_for_other_layers_is_refused() -> None:
    _, optimizer = with_fngd()
    policy = optimizer.preconditioner.policy
    state = policy.state_dict()
    with pytest.raises(ValueError, match=r"the state is for 1 layers, this model has \d+ attached ones"):
        policy.load_state_dict({**state, "means": torch.zeros(1)})
    assert policy.state_dict()["means"] is state["means"]


def test_of_steps_in_one_micro_batch_nothing_is_kept() -> None:
    model, optimizer = with_fngd()
    train(model, optimizer, steps=4)
    assert optimizer.preconditioner.policy.state_dict()["means"].count_nonzero() == 0


def test_no_step_forms_a_gram_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr("hf_fngd.layers.linear.gram", refuse)
    model, optimizer = with_fngd()
    train(model, optimizer, steps=9)
    assert set(optimizer.diagnostics()) == {"weight_spread", "largest_norm", "skipped"}
    with pytest.raises(AssertionError):
        train(model := net(), FNGD(model, sharing="never"), steps=1)


def test_spread_and_largest_norm_in_the_log_are_those_of_the_last_batch() -> None:
    model, optimizer = with_fngd(lr=0)
    assert optimizer.diagnostics() == {"weight_spread": 0, "largest_norm": 1, "skipped": 0}
    for scale in (1.0, 1e4):
        x, y = data(7)
        x[3] *= scale
        one_step(model, optimizer, x, y)
        exact = dense(net(), x, y, 1.0)
        w = torch.stack([clipped(exact[name].u.norm(dim=0).tolist()) for name in LAYER_NAMES])
        expected = (w.var(dim=1, correction=0) / w.mean(dim=1).square()).mean().sqrt()
        assert optimizer.diagnostics()["weight_spread"] == pytest.approx(float(expected))
        norms = torch.stack([exact[name].u.norm(dim=0) for name in LAYER_NAMES])
        largest = (norms.amax(dim=1) / norms.mean(dim=1)).median()
        assert optimizer.diagnostics()["largest_norm"] == pytest.approx(float(largest))


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
    report = preconditioner.coverage()
    assert (len(report.weighed), len(report.preconditioned)) == (4, 4)


# Steps of several micro-batches: the norms of the last step stand for those of the others ----------------------

ONES = 3 * [[1.0]]


def test_the_bound_is_the_mean_of_own_and_remembered_norms() -> None:
    policy = prepared("clipped")
    norms = [1.0, 2.0, 9.0, 0.0]
    (alone,) = step(policy, of_norms(*3 * [norms]))
    torch.testing.assert_close(alone, torch.tensor([1, 1, 4 / 9, 1], dtype=torch.float64).expand(3, 4))
    # Two layers of three micro-batches; the third has none but its own.
    first, second, third = of_norms([1.0], [2.0], []), of_norms([3.0, 0.0], [0.5, 0.0], []), of_norms([5, 7], [], [])
    step(policy, first, second, third)
    found, *_ = step(policy, of_norms(*3 * [norms]), second, third)
    norms = torch.tensor(norms, dtype=torch.float64)
    for place, known in enumerate((4.0, 1.25, 4.0)):
        bound = (4 + 2 * known) / 3
        torch.testing.assert_close(found[place], torch.where(norms > 0, bound / norms, 1).clamp(max=1))


def test_a_layer_without_norms_keeps_its_last_ones() -> None:
    policy = prepared("clipped")
    step(policy, of_norms([], [1.0], [4.0]), of_norms([], [3.0], [math.inf]))
    torch.testing.assert_close(policy.means.double(), torch.tensor([0.0, 2.0, 0.0]).double())
    step(policy, of_norms([5.0], [], []), of_norms([7.0], [], [2.0]))
    torch.testing.assert_close(policy.means.double(), torch.tensor([6.0, 2.0, 2.0]).double())


def test_a_micro_batch_without_gradients_is_clipped_by_nothing() -> None:
    policy = prepared("clipped")
    step(policy, of_norms(*ONES), of_norms(*ONES))
    found, _ = step(policy, of_norms(*3 * [[0.0, 0.0]]), of_norms(*ONES))
    assert torch.equal(found, torch.ones(3, 2, dtype=torch.float64))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_norm_that_overflows_is_not_hidden_by_what_is_remembered(bad: float) -> None:
    policy = prepared("clipped")
    step(policy, of_norms(*ONES), of_norms(*ONES))
    found, _ = step(policy, of_norms(*3 * [[1.0, bad]]), of_norms(*ONES))
    assert not (torch.tensor([1.0, bad]) * found[0]).isfinite().all()


def test_one_shorter_step_is_not_remembered_and_the_second_is() -> None:
    policy = prepared("clipped")
    full, short = 4 * [of_norms(*ONES)], 2 * [of_norms(*3 * [[8.0]])]
    for steps, parts, mean in (((full,), 4, 1.0), ((short,), 4, 1.0), ((full, short), 4, 1.0), ((short,), 2, 8.0)):
        for batches in steps:
            step(policy, *batches)
        assert (policy.parts, float(policy.means[0])) == (parts, mean)
    step(policy, *full)
    assert (policy.parts, float(policy.means[0])) == (4, 1.0)


@pytest.mark.parametrize("sizes", [(3, 3, 3), (4, 1, 2), (1, 1)])
def test_gradients_are_the_oracles(sizes: tuple[int, ...]) -> None:
    model, preconditioner = with_engine()
    known: dict[str, float] = {}
    for number in range(3):
        model.zero_grad()
        expected = dict.fromkeys(LAYER_NAMES, 0.0)
        means: dict[str, list[float]] = {name: [] for name in LAYER_NAMES}
        for place, size in enumerate(sizes):
            x, y = data(size, seed=10 * number + place)
            if number == 2 and place == 0:
                x[0] *= 1e3
            for name, oracle in dense(net(), x, y, 1.0).items():
                norms = oracle.u.norm(dim=0) / size  # of the gradients of the micro-batch's mean loss
                bound = mean = float(norms.mean())
                if number > 0:
                    bound = (mean + (len(sizes) - 1) * known[name]) / len(sizes)
                means[name] += norms.tolist()
                expected[name] = expected[name] + oracle.u @ (bound / norms).clamp(max=1) / size
            loss(model, x, y).backward()
        for name in LAYER_NAMES:
            assert relative_error(gradient(model.get_submodule(name)), expected[name]) < 1e-9
        preconditioner.step()
        known = {name: sum(mean) / len(mean) for name, mean in means.items()}


def micro_batches_of_one(optimizer: FNGD, model: nn.Module, factor: float) -> Tensor:
    """The gradient of sixteen samples one by one, one of which counts more."""
    optimizer.zero_grad()
    for n, (x, y) in enumerate(zip(*data(16), strict=True)):
        (loss(model, x[None], y[None]) * (factor if n == 5 else 1.0)).backward()
    return gradient(model.fc1)


def test_an_outlier_that_is_alone_in_its_micro_batch_is_clipped() -> None:
    model, optimizer = with_fngd(lr=0.0)
    clean = micro_batches_of_one(optimizer, model, 1.0)  # nothing is known yet, all sample weights are 1
    assert relative_error(micro_batches_of_one(optimizer, model, 1e4), clean) > 100
    optimizer.step()
    assert relative_error(micro_batches_of_one(optimizer, model, 1e4), clean) > 100  # the outlier was among the last
    assert optimizer.diagnostics()["weight_spread"] == 0
    optimizer = FNGD(model := net(), lr=0.0)
    micro_batches_of_one(optimizer, model, 1.0)
    optimizer.step()
    bounded = micro_batches_of_one(optimizer, model, 1.0)
    with_outlier = micro_batches_of_one(optimizer, model, 16.0)
    assert relative_error(with_outlier, bounded) < 0.5
    optimizer.step()
    assert optimizer.diagnostics()["weight_spread"] > 0.1  # over all micro-batches, each of which has one sample


def test_a_resumed_run_goes_on_with_the_same_bounds() -> None:
    model, optimizer = with_fngd(lr=1e-2)
    fresh = optimizer.preconditioner.policy.state_dict()
    micro_batches_of_one(optimizer, model, 3.0)
    optimizer.step()
    # A sharded checkpoint is loaded into the state of an optimizer that has done nothing yet.
    later = optimizer.preconditioner.policy.state_dict()
    assert fresh.keys() == later.keys()
    assert fresh["means"].shape == later["means"].shape
    resumed_model = net()
    resumed = FNGD(resumed_model, lr=1e-2)
    resumed_model.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        found = [micro_batches_of_one(o, m, 3.0) for o, m in ((optimizer, model), (resumed, resumed_model))]
        assert torch.equal(*found)
        optimizer.step()
        resumed.step()


def test_a_skipped_step_is_not_remembered() -> None:
    model, optimizer = with_fngd(lr=0.0)
    micro_batches_of_one(optimizer, model, 1.0)
    optimizer.step()
    before = optimizer.preconditioner.policy.state_dict()
    micro_batches_of_one(optimizer, model, math.inf)
    optimizer.step()
    assert optimizer.skipped == 1
    assert torch.equal(optimizer.preconditioner.policy.state_dict()["means"], before["means"])


class Twice(nn.Module):
    """A table that is used twice, the second time with much smaller gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.table(x) + 1e-3 * self.table(x.flip(1))).flatten(1))


def test_of_a_module_that_is_called_twice_no_norms_are_remembered() -> None:
    torch.manual_seed(0)
    model = Twice()
    optimizer = FNGD(model)
    for _ in range(2):
        for _ in range(3):
            nn.functional.cross_entropy(model(torch.randint(9, (5, 2))), torch.randint(4, (5,))).backward()
        optimizer.step()
    head, table = optimizer.preconditioner.policy.means
    assert head > 0
    assert table == 0


@pytest.mark.parametrize(("saved", "loaded", "factor"), [(1, 1, 1.0), (4, 4, 1.0), (2, 1, 0.5), (1, 4, 4.0)])
def test_norms_are_those_of_as_many_processes_as_go_on(
    monkeypatch: pytest.MonkeyPatch, saved: int, loaded: int, factor: float
) -> None:
    policy = prepared("clipped")
    step(policy, *4 * [of_norms([3.0], [1.0], [0.5])])
    monkeypatch.setattr("hf_fngd.weights.clipped.rank_and_world", lambda: (0, saved))
    state = policy.state_dict()
    monkeypatch.setattr("hf_fngd.weights.clipped.rank_and_world", lambda: (0, loaded))
    resumed = prepared("clipped")
    resumed.load_state_dict(state)
    assert torch.equal(resumed.means, factor * policy.means)


class Kernels(TorchDispatchMode):
    """Counts operations that are no views."""

    VIEWS = ("view", "t", "unsqueeze", "expand", "detach", "_unsafe_view")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ not in self.VIEWS
        return func(*args, **(kwargs or {}))


def test_sample_weights_take_few_kernels() -> None:
    counts = {}
    for sharing in ("uniform", "clipped"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        preconditioner = FNGDPreconditioner(model, sharing=sharing)
        for _ in range(3):
            loss = model(torch.randn(3, 5, 4)).sum()
            with Kernels() as kernels:
                loss.backward()
            preconditioner.step()
        counts[sharing] = kernels.count
    assert counts["clipped"] - counts["uniform"] <= 12 * 3
