"""What some models do with their layers that the families of this folder do not, or not by themselves."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from hf_fngd import FNGD, FNGDPreconditioner
from tests.architectures.oracle import DAMPING, PLAIN_TOLERANCE, TOLERANCE, silent
from tests.architectures.registry import VOCABULARY, WIDTH
from tests.nets import relative_error
from tests.reference import Dense, per_sample_gradients

SAMPLES, TOKENS, FEATURES, CLASSES = 5, 4, 6, 3


class InPlace(nn.Module):
    """Changes the output of a layer in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, FEATURES)
        self.classify = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(torch.relu_(self.layer(x).mul_(2)).mean(1))


class Twofold(InPlace):
    """Uses the weight of a layer past its forward as well, as in a tied projection or a penalty on the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(F.linear(torch.tanh(self.layer(x)), self.layer.weight).mean(1))


class Routed(InPlace):
    """Sends the first tokens of the batch through an expert, ``[tokens, features]``."""

    routed = 0

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        expert = torch.tanh(self.layer(tokens[: self.routed]))
        return self.classify(torch.cat([expert, tokens[self.routed :]]).view_as(x).mean(1))


class Queries(InPlace):
    """A layer whose input is the same for all samples, expanded to the batch without a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(TOKENS, FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        queries = self.layer(self.queries.expand(len(x), TOKENS, FEATURES))
        return self.classify((queries * x).mean(1))


def make(build: Callable[[], InPlace]) -> tuple[InPlace, InPlace, FNGDPreconditioner, Tensor, Tensor]:
    """A model, the same attached, its engine, and a batch."""
    torch.manual_seed(0)
    plain = build().double()
    model = copy.deepcopy(plain)
    x, y = torch.randn(SAMPLES, TOKENS, FEATURES, dtype=torch.float64), torch.randint(CLASSES, (SAMPLES,))
    return plain, model, FNGDPreconditioner(model, damping=DAMPING, sharing="never"), x, y


def run(model: InPlace, engine: FNGDPreconditioner, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of the layer after one backward pass."""
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    with silent():
        engine.step()
    return torch.cat([p.grad.flatten() for p in model.layer.parameters()])


def weighted(plain: InPlace, x: Tensor, y: Tensor) -> Tensor:
    def alone(model: nn.Module, n: int) -> Tensor:
        return F.cross_entropy(model(x[n : n + 1]), y[n : n + 1])

    return Dense(per_sample_gradients(plain, list(plain.layer.parameters()), alone, len(x)), DAMPING).p


def plain_gradient(plain: InPlace, x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(plain(x), y)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(plain.layer.parameters()))])


def test_the_output_of_a_layer_can_be_changed_in_place() -> None:
    plain, model, engine, x, y = make(InPlace)
    assert relative_error(run(model, engine, x, y), weighted(plain, x, y)) < TOLERANCE


def test_an_input_without_memory_of_its_own_is_one_of_every_sample() -> None:
    plain, model, engine, x, y = make(Queries)
    assert relative_error(run(model, engine, x, y), weighted(plain, x, y)) < TOLERANCE
    assert {"layer.weight", "layer.bias"} <= set(engine.coverage().preconditioned)


def test_a_weight_with_another_use_is_preconditioned_as_a_whole_or_reported() -> None:
    plain, model, engine, x, y = make(Twofold)
    found = run(model, engine, x, y)
    if "layer.weight" in engine.coverage().preconditioned:
        assert relative_error(found, weighted(plain, x, y)) < TOLERANCE
    else:
        assert relative_error(found, plain_gradient(plain, x, y)) < PLAIN_TOLERANCE


def test_an_expert_that_got_as_many_tokens_as_there_are_samples_stays_plain() -> None:
    plain, model, engine, x, y = make(Routed)
    for plain.routed in (SAMPLES + 2, SAMPLES, SAMPLES + 1):
        model.routed = plain.routed
        assert relative_error(run(model, engine, x, y), plain_gradient(plain, x, y)) < PLAIN_TOLERANCE
        assert {"layer.weight", "layer.bias"} <= set(engine.coverage().missed)


def test_a_model_whose_layers_are_a_subclass_of_linear_is_refused() -> None:
    config = hf.FalconConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match="no trainable torch.nn.Linear or transformers Conv1D"):
        FNGD(hf.FalconForCausalLM(config))
