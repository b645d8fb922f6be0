"""Models that draw random numbers in evaluation mode too: the probe draws the same ones for every sample."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fngd import FNGDPreconditioner
from hf_fngd.samples.draws import same_draws
from tests.nets import settings_of
from tests.reference import Clipping, Dense, per_sample_gradients, uses_of

WIDTH, LENGTH, DAMPING = 6, 4, 0.03


class Drawing(nn.Module):
    """Draws numbers of its own, in one of several ways; those of the last forward pass stay in ``last``."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.generator = kind, torch.Generator()
        self.first, self.mean, self.spread = nn.Linear(WIDTH, 5), nn.Linear(5, WIDTH), nn.Linear(5, WIDTH)
        self.last_layer = nn.Linear(WIDTH, 3)
        self.last: list[Tensor] = []
        self.again: list[Tensor] | None = None  # the numbers to take instead

    def drawn(self, numbers: Tensor) -> Tensor:
        if self.again is not None:
            return self.again.pop(0)
        self.last.append(numbers)
        return numbers

    def forward(self, x: Tensor) -> Tensor:
        self.last = []
        n = len(x)
        if self.kind == "diffusion":
            angle = self.drawn(torch.randint(1, 50, (n,), generator=self.generator))[:, None, None] / 10
            x = x * angle.cos() + self.drawn(torch.randn(x.shape, dtype=x.dtype)) * angle.sin()
        if self.kind == "masked":
            kept = self.drawn(torch.rand(n, LENGTH)).argsort(dim=1)[:, : LENGTH // 2, None]
            x = x.gather(1, kept.expand(-1, -1, WIDTH))
        if self.kind == "dropout":
            x = x * self.drawn(F.dropout(torch.ones_like(x), 0.4, training=True))
        y = torch.tanh(self.first(x))
        z = self.mean(y)
        if self.kind == "variational":
            z = z + self.drawn(torch.randn_like(z)) * torch.exp(self.spread(y) / 2)
        if self.kind == "categorical":
            z = z + self.drawn(torch.distributions.Categorical(logits=y.mean(1)).sample())[:, None, None]
        found: Tensor = self.last_layer(torch.tanh(z)).mean(1)
        return found


KINDS = ["diffusion", "masked", "dropout", "variational", "categorical"]


@pytest.mark.parametrize("samples", [5, 4, 1])
@pytest.mark.parametrize("sharing", ["clipped", "never"])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_weighed_whatever_is_drawn(kind: str, sharing: str, samples: int) -> None:
    torch.manual_seed(0)
    model = Drawing(kind).double()
    plain = copy.deepcopy(model)
    preconditioner = FNGDPreconditioner(model, **settings_of(sharing, damping=DAMPING))
    x, y = torch.randn(samples, LENGTH, WIDTH, dtype=torch.float64), torch.randint(3, (samples,))
    x[0] *= 20
    F.cross_entropy(model(x), y).backward()
    preconditioner.step()
    assert not preconditioner.coverage().note
    numbers = model.last
    modules = ["first", "mean", "last_layer"] + ["spread"] * (kind == "variational")

    def alone(model: nn.Module, n: int) -> Tensor:
        model.again = [one[n : n + 1] for one in numbers]
        return F.cross_entropy(model(x[n : n + 1]), y[n : n + 1])

    def share(model: nn.Module, n: int) -> Tensor:
        return alone(model, n) / samples

    trained = {name for name, _ in plain.named_parameters()}
    for module in modules:
        own = dict(plain.get_submodule(module).named_parameters(module))
        if sharing == "clipped":
            found, _ = Clipping().gradients([uses_of(plain, [module], share, n, trained) for n in range(samples)])
        else:
            p = Dense(per_sample_gradients(plain, list(own.values()), alone, samples), DAMPING).p
            found = dict(zip(own, p.split([q.numel() for q in own.values()]), strict=True))
        for name, g in found.items():
            grad = model.get_parameter(name).grad
            torch.testing.assert_close(grad, g.view_as(grad), rtol=1e-7, atol=1e-10, msg=f"{name} {sharing}")


def test_the_probe_leaves_the_generators_as_they_were() -> None:
    states = []
    for attached in (False, True):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        model = Drawing("diffusion")
        kept = FNGDPreconditioner(model) if attached else None
        model(torch.randn(5, LENGTH, WIDTH)).sum().backward()
        if kept is not None:
            kept.step()
        own = model.generator.get_state().tolist()
        states.append((torch.get_rng_state().tolist(), own, random.random(), float(np.random.rand())))
    assert states[0] == states[1]


def test_generators_of_devices_that_are_not_used_are_not_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(seed: int) -> None:
        raise AssertionError

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)  # which torch.manual_seed would call, now or later
    with same_draws(4, 0):
        torch.rand(4, 3)
        torch.empty(4).normal_()


def test_operators_draw_the_same_for_every_sample_and_in_every_pass() -> None:
    other = torch.Generator()
    probabilities = torch.rand(5, 7)

    def draws(samples: int) -> list[Tensor]:
        like, own = torch.zeros(samples, 3), torch.Generator()
        with same_draws(samples, 0):
            found = [
                torch.randn(samples, 2),
                torch.rand(samples, 2, generator=own),
                torch.randint(9, (samples, 4)),
                torch.randn_like(like),
                like.clone().uniform_(),
                torch.zeros(samples, 30).bernoulli_(0.5),
                torch.empty(samples, 3).exponential_(generator=own),
                torch.normal(like, 1.0),
                torch.normal(like, torch.ones(samples, 3), generator=other),
                torch.bernoulli(torch.full((samples, 30), 0.5)),
                torch.poisson(like + 4),
                torch.multinomial(probabilities[:1].expand(samples, -1), 3),
                F.dropout(torch.ones(samples, 30)),
                F.gumbel_softmax(like),
                torch.native_dropout(torch.ones(samples, 30), 0.5, True)[1],
                torch.distributions.Gamma(like + 1, like + 1).sample(),
                F.rrelu(torch.full((samples, 30), -1.0), training=True),
            ]
            shared = torch.rand(3, 3)
            assert torch.equal(own.get_state(), torch.Generator().get_state())
            return [*(one.sort(0).values for one in found), shared.expand(samples, 3, 3)]

    for more, fewer in zip(draws(5), draws(4), strict=True):
        assert torch.equal(more[:1].expand_as(more), more)
        assert torch.equal(more[:4], fewer)
        assert len(more.unique()) > 1


def test_what_the_batch_does_not_hold_is_drawn_as_a_whole() -> None:
    with same_draws(4, 1):
        assert torch.equal(torch.rand(3, 4), torch.rand(3, 4)) is False
        rows = torch.rand(3, 4)
        assert torch.equal(rows[:, :1].expand_as(rows), rows)
        columns = torch.rand(4, 3)
        assert torch.equal(columns[:1].expand_as(columns), columns)
        assert len(torch.rand(3, 2).unique()) == 6
        assert sorted(torch.randperm(4).tolist()) == [0, 1, 2, 3]
