"""The optimizers that FNGD is compared with, each on a case whose answer is known."""

import math

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, Trainer

from baselines import BASELINES, BaselineFactory
from baselines.eva import Eva
from baselines.factory import baseline_layers
from baselines.kfac import KFAC, EigenKFAC
from baselines.muon import Muon
from baselines.shampoo import Shampoo, inverse_fourth_root
from tests.modes.harness import arguments
from tests.nets import CLASSES, WithLoss, data, loss, net, samples

LAYER_TYPES = ["Linear", "Conv1D"]


def gpt2(layers=1, vocabulary=50):
    sizes = {"vocab_size": vocabulary, "n_positions": 8, "n_embd": 16, "n_layer": layers, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(tie_word_embeddings=False, **sizes))


def rows(model, x, y):
    """Inputs and gradients of single positions `[M, features]` of each layer, by torch.autograd.grad."""
    seen = []
    hooks = [m.register_forward_hook(lambda m, a, out: seen.append((a[0], out))) for m in (model.fc1, model.fc2)]
    grads = torch.autograd.grad(loss(model, x, y), [out for _, out in seen])
    for hook in hooks:
        hook.remove()
    pairs = [(a.detach().flatten(0, -2), g.flatten(0, -2)) for (a, _), g in zip(seen, grads, strict=True)]
    return [(a, g * len(g)) for a, g in pairs]


def direction(cls, model, batches, **options):
    """What one step subtracts from each layer's weight, and its gradient, as `[o, i]`."""
    layers = [model.fc1, model.fc2]
    options = {"lr": 1.0, "momentum": 0.0, "kl_clip": math.inf} | options
    optimizer = cls([{"params": [layer.weight for layer in layers]}], layers, **options)
    before = [layer.weight.detach().clone() for layer in layers]
    for x, y in batches:
        (loss(model, x, y) / len(batches)).backward()
    optimizer.step()
    changes = [old - layer.weight.detach() for old, layer in zip(before, layers, strict=True)]
    grads = [layer.weight.grad for layer in layers]
    return [[t if isinstance(model.fc1, nn.Linear) else t.mT for t in ts] for ts in (changes, grads)]


def dense(cls, a, g, damping):
    """The matrix that a baseline inverts, from the inputs and gradients of single positions."""
    if cls is Eva:
        v = torch.kron(g.mean(0), a.mean(0))
        return v.outer(v) + damping * torch.eye(len(v))
    A, G = a.mT @ a / len(a), g.mT @ g / len(g)
    if cls is EigenKFAC:
        return torch.kron(G, A) + damping * torch.eye(len(G) * len(A))
    pi = ((A.trace() / len(A)) / (G.trace() / len(G))).sqrt()
    root = damping**0.5
    return torch.kron(G + root / pi * torch.eye(len(G)), A + root * pi * torch.eye(len(A)))


@pytest.mark.parametrize("cls", [KFAC, EigenKFAC, Eva])
@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize("between", [(), (3,)])
def test_the_dense_matrix_is_inverted(cls, layer_type, between):
    model, batch = net(layer_type=layer_type), data(6, *between)
    inputs = rows(model, *batch)
    found, grads = direction(cls, model, [batch], damping=0.01)
    for p, grad, (a, g) in zip(found, grads, inputs, strict=True):
        torch.testing.assert_close(p.flatten(), torch.linalg.solve(dense(cls, a, g, 0.01), grad.flatten()))


@pytest.mark.parametrize("cls", [KFAC, Eva])
def test_statistics_are_those_of_all_micro_batches(cls):
    x, y = data(6, 3)
    whole, _ = direction(cls, net(), [(x, y)])
    parts, _ = direction(cls, net(), [(x[:3], y[:3]), (x[3:], y[3:])])
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("cls", [KFAC, Eva])
def test_padding_has_no_part_in_the_statistics(cls):
    x, y = data(6)
    alone, _ = direction(cls, net(), [(x[:4], y[:4])])
    y[4:] = -100  # what a loss ignores
    padded, _ = direction(cls, net(), [(x, y)])
    torch.testing.assert_close(padded, alone)


@pytest.mark.parametrize("cls", [KFAC, Eva])
def test_a_step_leaves_no_trust_region(cls):
    whole, grads = direction(cls, net(), [data(6)])
    size = 0.1**2 * sum((p * g).sum() for p, g in zip(whole, grads, strict=True))
    for kl_clip, scale in ((size / 4, 0.5), (size * 4, 1.0)):
        clipped, _ = direction(cls, net(), [data(6)], lr=0.1, kl_clip=float(kl_clip))
        torch.testing.assert_close(clipped, [0.1 * scale * p for p in whole])


def test_kfac_keeps_to_its_intervals_and_leaves_evaluation_alone():
    model = net()
    layers = [model.fc1, model.fc2]
    optimizer = KFAC(
        [{"params": [layer.weight for layer in layers]}], layers, lr=0.01, statistics_every=2, inverse_every=4
    )
    changes = {"A": [], "A_inverse": []}
    old = dict.fromkeys(changes)
    for step in range(9):
        model.eval()
        loss(model, *data(6, seed=90)).backward()
        model.train()
        model.zero_grad()
        loss(model, *data(6, seed=step)).backward()
        optimizer.step()
        for key, steps in changes.items():
            new = optimizer.state[model.fc2.weight][key].clone()
            if old[key] is None or not torch.equal(old[key], new):
                steps.append(step)
            old[key] = new
    assert changes == {"A": [0, 2, 4, 6, 8], "A_inverse": [0, 4, 8]}


def test_shampoos_first_root_makes_the_update_orthogonal_and_of_adams_size():
    torch.manual_seed(0)
    g = torch.randn(4, 6, dtype=torch.float64)
    p = nn.Parameter(torch.zeros_like(g))
    optimizer = Shampoo([{"params": [p]}], lr=0.1, ridge=1e-14, statistics_every=1, inverse_every=1)
    p.grad = g
    optimizer.step()
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    # Adam's first update is the sign of the gradient: 24 entries of size 1; that of u v has the norm of 4 ones.
    torch.testing.assert_close(p.detach(), -0.1 * (24 / 4) ** 0.5 * u @ v, rtol=1e-4, atol=1e-6)


def test_shampoo_follows_its_definition():
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(3, 5, dtype=torch.float64))
    adam_p = nn.Parameter(p.detach().clone())
    optimizer = Shampoo([{"params": [p]}], lr=0.1, statistics_every=2, inverse_every=4)
    adam = torch.optim.Adam([adam_p], lr=0.1, betas=(0.9, 0.99))
    L, R = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(5, 5, dtype=torch.float64)
    mean = torch.zeros_like(p)
    for step in range(1, 10):
        p.grad = torch.randn(3, 5, dtype=torch.float64)
        adam_p.grad = p.grad.clone()
        before, adam_before = p.detach().clone(), adam_p.detach().clone()
        optimizer.step()
        adam.step()
        change, adam_change = p.detach() - before, adam_p.detach() - adam_before
        mean = 0.9 * mean + 0.1 * p.grad
        if step % 2 == 0:
            L = 0.99 * L + 0.01 * p.grad @ p.grad.mT
            R = 0.99 * R + 0.01 * p.grad.mT @ p.grad
        if step % 4 == 0:
            roots = []
            for M in (L, R):
                values, vectors = torch.linalg.eigh(M + 1e-6 * torch.linalg.matrix_norm(M, 2) * torch.eye(len(M)))
                roots.append(vectors @ torch.diag(values**-0.25) @ vectors.mT)
        if step < 4:
            torch.testing.assert_close(change, adam_change)
        else:
            expected = -roots[0] @ mean @ roots[1]
            torch.testing.assert_close(change, expected * adam_change.norm() / expected.norm(), rtol=1e-5, atol=1e-8)


def test_a_root_of_nothing_is_the_identity():
    assert torch.equal(inverse_fourth_root(torch.zeros(3, 3), 1e-6), torch.eye(3))


def test_muon_is_torchs():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((8, 5), (5, 8), (8, 5))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    muon = Muon([{"params": ours, "weight_decay": 0.1}], lr=0.1)
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        before = ours[0].detach().clone()
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        muon.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.01)  # theirs is in bfloat16
    update = (before * (1 - 0.01) - ours[0].detach()) / (0.1 * 0.2 * 8**0.5)
    values = torch.linalg.svdvals(update)
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_soap_commutes_with_rotations():
    soap = pytest.importorskip("pytorch_optimizer", reason="it is in the extra 'recipes'").SOAP
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0] for _ in range(2))
    grads = [torch.randn(5, 5, dtype=torch.float64) for _ in range(12)]
    ends = []
    for turn in (lambda g: g, lambda g: left @ g @ right):
        p = nn.Parameter(torch.zeros(5, 5, dtype=torch.float64))
        optimizer = soap([p], lr=0.1, weight_decay=0.0, precondition_frequency=100)
        for g in grads:
            p.grad = turn(g)
            optimizer.step()
        ends.append(p.detach())
    torch.testing.assert_close(ends[1], left @ ends[0] @ right, rtol=1e-5, atol=1e-7)
    # Eleven steps of Adam with random signs, in some basis.
    assert 0.1 < ends[0].square().mean().sqrt() < 1.2


LEARNING_RATES = {"muon": 0.02, "soap": 0.02, "shampoo": 0.02, "kfac": 0.3, "kfac_eigen": 0.3, "eva": 0.3}


def test_every_baseline_learns(name):
    model = net(dtype=torch.float32)
    x, y = data(64, dtype=torch.float32)
    y = x[:, :CLASSES].argmax(1)
    optimizer = BaselineFactory()(model, name=name, lr=LEARNING_RATES[name])
    first = loss(model, x, y).item()
    for _ in range(150):
        optimizer.zero_grad()
        loss(model, x, y).backward()
        optimizer.step()
    assert loss(model, x, y).item() < first / 3


def test_muon_alone_leaves_a_classifier_to_adamw(name):
    model = GPT2ForSequenceClassification(gpt2().config)
    optimizer = BaselineFactory()(model, name=name, lr=0.1)
    matrices = {id(p) for group in optimizer.optimizers[0].param_groups for p in group["params"]}
    assert (id(model.score.weight) in matrices) == (name != "muon")


def test_weight_decay_spares_biases_and_norms(name):
    model = net(dtype=torch.float32)
    optimizer = BaselineFactory()(model, name=name, lr=0.1, weight_decay=0.5)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    for _ in range(2):  # SOAP only looks at the first gradient
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for key, p in model.named_parameters():
        shrunk = key in ("fc1.weight", "fc2.weight")
        share = (0.95 if name == "soap" else 0.95**2) if shrunk else 1.0
        torch.testing.assert_close(p.detach(), share * before[key], msg=key)


def test_every_baseline_updates_all_parameters_and_the_same_matrices_by_its_rule(name):
    model = gpt2()
    optimizer = BaselineFactory()(model, name=name, lr=0.1)
    ruled, others = ({id(p) for g in part.param_groups for p in g["params"]} for part in optimizer.optimizers)
    names = {key for key, p in model.named_parameters() if id(p) in ruled}
    block = "transformer.h.0"
    assert names == {f"{block}.{key}.weight" for key in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert ruled | others == {id(p) for p in model.parameters()}


def test_the_output_vocabulary_is_left_out_and_nothing_else_of_its_width():
    names = set(baseline_layers(gpt2(vocabulary=64)))  # c_fc has 64 outputs too
    assert "transformer.h.0.mlp.c_fc" in names
    assert "lm_head" not in names


def test_a_model_of_nothing_but_its_vocabulary_is_refused():
    with pytest.raises(ValueError, match="nothing to precondition"):
        baseline_layers(gpt2(layers=0))


def trained(folder, name, **options):
    changes = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "lr_scheduler_type": "linear"}
    intervals = {"statistics_every": 2, "inverse_every": 4}
    kwargs = {option: intervals[option] for option in intervals if option in BASELINES[name].options}
    trainer = Trainer(
        WithLoss(),
        arguments(folder, save_strategy="steps", save_steps=5, **changes),
        train_dataset=samples(48),
        optimizer_cls_and_kwargs=(BaselineFactory, {"name": name, "lr": 0.01, "weight_decay": 0.1, **kwargs}),
    )
    trainer.train(**options)
    return trainer


def test_a_resumed_training_ends_like_one_that_was_not_interrupted(tmp_path, name):
    whole = trained(tmp_path / "whole", name)
    resumed = trained(tmp_path / "resumed", name, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert whole.state.global_step == resumed.state.global_step == 12
    assert whole.optimizer.param_groups[0]["lr"] == 0  # the schedule's end, seen through accelerate's wrapper
    assert whole.optimizer.optimizer.optimizers[0].param_groups[0]["lr"] == 0
    for p, q, start in zip(whole.model.parameters(), resumed.model.parameters(), WithLoss().parameters(), strict=True):
        assert torch.equal(p, q)
        assert not torch.equal(p, start)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "lion"}, "'lion' is no baseline; there are muon"),
        ({"name": "muon", "damping": 0.1}, "muon has no use for damping; it takes momentum"),
        ({"name": "kfac", "damping": 0.0}, "damping is 0.0"),
        ({"name": "kfac", "statistics_every": 3}, "statistics_every=3 does not divide inverse_every=100"),
        ({"name": "shampoo", "inverse_every": 15}, "statistics_every=10 does not divide inverse_every=15"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BaselineFactory()(net(), lr=0.1, **options)
