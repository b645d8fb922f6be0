"""Samples' gradients clipped at one tensor."""

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_fngd import FNGD, clip_samples


def gradient(shape: tuple[int, ...], g: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """What reaches a leaf through `clip_samples` from an output gradient."""
    leaf = torch.zeros(shape, dtype=dtype, requires_grad=True)
    output = clip_samples(leaf)
    assert torch.equal(output, leaf)
    output.backward(g)
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("shape", [(7,), (7, 3), (7, 4, 3), (7, 2, 3, 4), (1, 5)])
def test_norms_above_the_mean_are_brought_down_to_it(shape: tuple[int, ...]) -> None:
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = [row.flatten() for row in g]
    bound = sum(float(row.norm()) for row in rows) / len(rows)
    expected = [row * min(1.0, bound / float(row.norm())) for row in rows]
    torch.testing.assert_close(gradient(shape, g).flatten(), torch.cat(expected))


def test_samples_without_a_gradient_have_no_part_in_the_mean() -> None:
    g = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 15.0]], dtype=torch.float64)
    torch.testing.assert_close(gradient((3, 2), g), torch.tensor([[0, 0], [3, 4], [0, 10]], dtype=torch.float64))
    assert torch.equal(gradient((3, 2), torch.zeros_like(g)), torch.zeros_like(g))


def test_an_empty_batch_and_samples_without_entries_pass() -> None:
    for shape in ((0, 3), (2, 0, 3)):
        assert gradient(shape, torch.zeros(shape, dtype=torch.float64)).shape == shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_half_precision_do_not_overflow(dtype: torch.dtype) -> None:
    g = torch.full((2, 100), 3e4, dtype=dtype)  # 3e5 long
    g[0] /= 4
    clipped = gradient((2, 100), g, dtype)
    assert clipped.dtype == dtype
    torch.testing.assert_close(clipped[:, 0].double(), torch.tensor([7500.0, 18750.0]).double(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_not_hidden(bad: float) -> None:
    g = torch.ones(4, 3, dtype=torch.float64)
    g[1, 2] = bad
    assert not gradient((4, 3), g).isfinite().all()


@pytest.mark.parametrize("shape", [(12,), (12, 3), (3, 4, 5)])
def test_rows_with_one_id_are_one_sample(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(shape, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 4, shape[: max(1, len(shape) - 1)], generator=generator) * 1000 - 7
    leaf = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    clip_samples(leaf, ids).backward(g)
    norms = {int(one): float(g[ids == one].norm()) for one in ids.unique()}
    bound = sum(norms.values()) / len(norms)
    expected = torch.stack(
        [w * row for row, w in ((g[at], min(1.0, bound / norms[int(ids[at])])) for at in places(ids))]
    )
    torch.testing.assert_close(leaf.grad, expected.view(shape))


def places(ids: Tensor) -> list[tuple[int, ...]]:
    return [tuple(index.tolist()) for index in torch.ones_like(ids).nonzero()]


def test_flattened_logits_are_clipped_as_those_of_the_batch() -> None:
    g = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flat = torch.zeros(24, 5, dtype=torch.float64, requires_grad=True)
    clip_samples(flat, torch.arange(4).repeat_interleave(6)).backward(g.flatten(0, 1))
    torch.testing.assert_close(flat.grad, gradient((4, 6, 5), g).flatten(0, 1))


def test_ids_of_another_shape_or_type_are_refused() -> None:
    logits = torch.ones(3, 2, requires_grad=True)
    with pytest.raises(ValueError, match=r"sample_ids has the shape \(2,\).*\(3, 2\): give one for each of its rows"):
        clip_samples(logits, torch.arange(2))
    with pytest.raises(TypeError, match="a tensor of integers"):
        clip_samples(logits, torch.ones(3))


def test_no_gradient_is_asked_of_what_has_none() -> None:
    logits = torch.ones(3, 2)
    assert not clip_samples(logits).requires_grad
    logits.requires_grad_()
    with torch.no_grad():
        assert clip_samples(logits) is logits


def test_an_output_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match=r"got tuple: .*\.logits.*model\.lm_head"):
        clip_samples((torch.ones(3, 2),))  # type: ignore[arg-type]


def test_a_scalar_has_no_samples() -> None:
    with pytest.raises(ValueError, match=r"first dimension is the sample.*before the loss is averaged"):
        clip_samples(torch.tensor(1.0, requires_grad=True))


def test_a_model_may_change_its_logits_in_place() -> None:
    x = torch.randn(6, 3, requires_grad=True, generator=torch.Generator().manual_seed(0))
    clip_samples(logits := 2 * x)[:, 0] = -1e9
    torch.logsumexp(logits, dim=1).square().sum().backward()
    g = x.grad / 2
    assert torch.equal(g[:, 0], torch.zeros(6))
    norms = g.norm(dim=1)
    assert float((norms - norms.max()).abs().sort().values[1]) < 1e-5  # those above the mean are as long as each other


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_it_is_part_of_a_graph_without_a_break() -> None:
    def step(x: Tensor) -> Tensor:
        return clip_samples(x * 2).square().sum()

    x = torch.randn(6, 3, requires_grad=True, generator=torch.Generator().manual_seed(0))
    (expected,) = torch.autograd.grad(step(x), x)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    (found,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(found, expected)


def test_a_hook_on_the_head_of_a_model_that_computes_its_loss_is_the_same() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=23, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()  # no dropout
    ids = torch.randint(23, (5, 6), generator=torch.Generator().manual_seed(0))
    logits = clip_samples(model(ids).logits)
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model.lm_head.register_forward_hook(lambda module, args, logits: clip_samples(logits))
    model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


def test_it_reaches_what_fngd_leaves_plain() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GroupNorm(2, 8), nn.Linear(8, 3)).double()
    x, y = torch.randn(16, 4, dtype=torch.float64), torch.randint(3, (16,))
    factors = torch.ones(16, dtype=torch.float64)
    factors[5] = 1e6

    own, norms = [], []
    for n in range(16):
        logits = model(x[n : n + 1])
        loss = factors[n] * nn.functional.cross_entropy(logits, y[n : n + 1])
        at_logits, at_norm = torch.autograd.grad(loss, [logits, model[1].weight])
        own.append(at_norm)
        norms.append(at_logits.norm())
    bound = torch.stack(norms).mean()
    expected = sum(g * (bound / norm).clamp(max=1) for g, norm in zip(own, norms, strict=True))

    FNGD(model)
    losses = nn.functional.cross_entropy(clip_samples(model(x)), y, reduction="none")
    (losses * factors).sum().backward()
    torch.testing.assert_close(model[1].weight.grad, expected)
