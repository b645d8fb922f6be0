"""Embeddings and tied heads: their gradients are weighted sums."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hf_fngd.sharing import INDEX_COLUMN
from tests.rest.setting import (
    LENGTH,
    PLAIN,
    TABLE,
    WIDTH,
    LanguageModel,
    after_a_coefficient_step,
    attach,
    batch,
    check,
    gradients,
    kept,
    losses,
    model,
    weighted,
)

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
