"""FNGD under sentence-transformers' Trainer: a step has several forward passes, and a loss that couples the samples."""

import copy
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import (
    AdaptiveLayerLoss,
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
    SoftmaxLoss,
)
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_fngd import FNGD, FNGDCallback, FNGDFactory
from tests.modes.nets import INITIAL, POSITIONS, VOCABULARY
from tests.modes.oracle import Measured, clipped
from tests.modes.wrapped import tokenizer
from tests.reference import Clipping, per_sample_gradients
from tests.steps import relative_error

PAIRS, BATCH, STEPS, WIDTH = 12, 6, 4, 8


@pytest.fixture
def model(tmp_path: Path) -> SentenceTransformer:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 12, "max_position_embeddings": POSITIONS, "initializer_range": INITIAL}
    config = hf.BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    hf.BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    encoder = Transformer(str(tmp_path / "bert"), max_seq_length=POSITIONS)
    return SentenceTransformer(modules=[encoder, Pooling(WIDTH)], device="cpu")


def pairs() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    sides = [
        [
            " ".join(f"t{token}" for token in torch.randint(2, VOCABULARY, (2 + n % 4,), generator=generator).tolist())
            for n in range(PAIRS)
        ]
        for _ in range(2)
    ]
    return Dataset.from_dict({"anchor": sides[0], "positive": sides[1]})


class Recorder(TrainerCallback):
    """Each forward pass's features, and what the loss sends back to its embeddings; each step's gradients."""

    def __init__(self, model: SentenceTransformer) -> None:
        self.pending: list[tuple[dict[str, Tensor], Tensor]] = []
        self.steps: list[tuple[dict[str, Tensor], list[tuple[dict[str, Tensor], Tensor]], dict[str, Tensor]]] = []
        self.model = model
        model.register_forward_hook(self.passed)

    def passed(self, module: nn.Module, args: tuple[dict[str, Tensor]], output: dict[str, Tensor]) -> None:
        embeddings = output["sentence_embedding"]
        if embeddings.requires_grad:  # else it is the first pass of a cached loss
            features = {name: args[0][name].clone() for name in ("input_ids", "attention_mask")}
            sent = torch.zeros_like(embeddings)
            self.pending.append((features, sent))
            embeddings.register_hook(partial(self.sent_back, sent))

    @staticmethod
    def sent_back(sent: Tensor, gradient: Tensor) -> None:
        sent.copy_(gradient)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        named = dict(self.model.named_parameters())
        before = {name: p.detach().clone() for name, p in named.items()}
        gradients = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
        self.steps.append((before, self.pending, gradients))
        self.pending = []


def measured(model: nn.Module, features: dict[str, Tensor], sent: Tensor, names: list[str]) -> Measured:
    """A forward pass, sample by sample: a sample's loss is what the pass's loss sends back to its embedding."""

    def alone(model: nn.Module, n: int) -> Tensor:
        row = {name: x[n : n + 1] for name, x in features.items()}
        return (model(row)["sentence_embedding"][0] * sent[n].double()).sum()

    parameters = [dict(model.named_parameters())[name] for name in names]
    rows = per_sample_gradients(model, parameters, alone, len(sent)).split([p.numel() for p in parameters])
    return Measured(alone, dict(zip(names, rows, strict=True)), 1.0, len(sent))


@pytest.mark.parametrize("part", [None, BATCH, 4, 1])
def test_samples_of_every_forward_pass_are_clipped(
    model: SentenceTransformer, tmp_path: Path, part: int | None
) -> None:
    copied = copy.deepcopy(model).double()
    optimizer, recorder = FNGD(model, lr=1e-2), Recorder(model)
    loss = (
        MultipleNegativesRankingLoss(model)
        if part is None
        else CachedMultipleNegativesRankingLoss(model, mini_batch_size=part)
    )
    args = SentenceTransformerTrainingArguments(
        str(tmp_path / "out"),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        max_grad_norm=0,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = SentenceTransformerTrainer(
        model, args, pairs(), loss=loss, optimizers=(optimizer, None), callbacks=[FNGDCallback(), recorder]
    )
    trainer.train()

    passes = 2 if part is None else 2 * -(-BATCH // part)
    assert [len(batches) for _, batches, _ in recorder.steps] == [passes] * STEPS
    report, clipping, contrast = optimizer.coverage(), Clipping(), 0.0
    assert report.missed.keys() == {"0.model.pooler.dense.weight", "0.model.pooler.dense.bias"}
    weighed = [*dict.fromkeys(name.rpartition(".")[0] for name in (*report.preconditioned, *report.weighed))]
    for number, (before, batches, gradients) in enumerate(recorder.steps):
        copied.load_state_dict(before)
        of_passes = [measured(copied, features, sent, list(gradients)) for features, sent in batches]
        exact, plain = clipped(copied, of_passes, weighed, clipping, inspected=number > 0)
        for name, gradient in gradients.items():
            if plain[name].norm() > 1e-9:  # a key's bias has none
                assert relative_error(gradient.flatten().double(), exact[name]) < 1e-4, name
                contrast = max(contrast, float(relative_error(plain[name], exact[name])))
    assert contrast > 0.3, "plain gradients would have passed"


@pytest.mark.parametrize("by", ["factory", "callback", "loss"])
def test_parameters_of_the_loss_are_trained_or_an_error(model: SentenceTransformer, tmp_path: Path, by: str) -> None:
    args = SentenceTransformerTrainingArguments(
        str(tmp_path / "out"), per_device_train_batch_size=BATCH, max_steps=2, report_to=[], use_cpu=True
    )
    data = pairs().add_column("label", [0, 1] * (PAIRS // 2))
    loss = SoftmaxLoss(model, WIDTH, num_labels=2)
    before = loss.classifier.weight.detach().clone()
    way: dict[str, Any] = {"optimizer_cls_and_kwargs": (FNGDFactory, {"args": args})}
    if by != "factory":
        way = {"optimizers": (FNGD(loss if by == "loss" else model), None), "callbacks": [FNGDCallback()]}
    trainer = SentenceTransformerTrainer(model, args, data, loss=loss, **way)
    if by != "loss":
        with pytest.raises(
            ValueError, match=r"SoftmaxLoss has parameters of its own, classifier\.weight.*FNGD\(loss\)"
        ):
            trainer.train()
        return
    trainer.train()
    assert not torch.equal(loss.classifier.weight, before)


def columns(model: SentenceTransformer) -> list[dict[str, Tensor]]:
    data = pairs()[:BATCH]
    return [dict(model.tokenize(data[name])) for name in ("anchor", "positive")]


def test_samples_of_a_loss_that_is_a_model_are_clipped(model: SentenceTransformer) -> None:
    loss = SoftmaxLoss(model, WIDTH, num_labels=2)
    copied = copy.deepcopy(model).double()
    optimizer, recorder = FNGD(loss, lr=1e-2, exclude_modules=["embeddings"]), Recorder(model)
    for _ in range(2):
        optimizer.zero_grad()
        loss(columns(model), torch.tensor([0, 1] * (BATCH // 2))).backward()
    assert all("pooler" in name for name in optimizer.coverage().missed)
    gradients = {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None and "embeddings" not in name
    }
    names = [*dict.fromkeys(name.rpartition(".")[0] for name in gradients)]
    weighed = [name for name in names if not isinstance(model.get_submodule(name), nn.LayerNorm)]
    of_passes = [measured(copied, *one, list(gradients)) for one in recorder.pending[2:]]
    found = [clipped(copied, [one], weighed, Clipping(), inspected=True) for one in of_passes]
    contrast = 0.0
    for name, gradient in gradients.items():
        exact, plain = (sum(one[which][name] for one in found) for which in (0, 1))
        if plain.norm() > 1e-9:
            assert relative_error(gradient.flatten().double(), exact) < 1e-4, name
            contrast = max(contrast, float(relative_error(plain, exact)))
    assert contrast > 0.1, "plain gradients would have passed"


@pytest.mark.parametrize("loss", [MatryoshkaLoss, AdaptiveLayerLoss])
def test_a_loss_that_keeps_what_the_model_returned_sees_no_probe(
    model: SentenceTransformer, loss: type[nn.Module]
) -> None:
    plain, found = copy.deepcopy(model), []
    optimizer = FNGD(model, sharing="uniform")
    for one in (model, plain):
        random.seed(0)  # which layers AdaptiveLayerLoss takes
        inner = MultipleNegativesRankingLoss(one)
        whole = loss(one, inner, [WIDTH, 4, 2]) if loss is MatryoshkaLoss else loss(one, inner)
        whole(columns(one), None).backward()
        found.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*found)
    assert optimizer.coverage().preconditioned
