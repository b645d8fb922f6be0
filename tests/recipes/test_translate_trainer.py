"""Model, loss, optimizers, plot of the translation recipe."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.trainer_pt_utils import LabelSmoother

from baselines import BaselineFactory
from common.arguments import OptimizerArguments
from common.optimizers import describe, fngd_config, optimizer_cls_and_kwargs
from common.outliers import OutlierArguments
from common.tokenizer import train_tokenizer
from common.trainer import make_loss
from hf_fngd import FNGDFactory
from tests.recipes.translate_pairs import PAIRS
from translation.arguments import DataArguments, ModelArguments, TranslationTrainingArguments
from translation.model import build_model
from translation.plot import plot_learning_curve


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    tokenizer = train_tokenizer([pair["de"] for pair in PAIRS], 300)
    return build_model(
        tokenizer,
        ModelArguments(d_model=64, encoder_layers=2, decoder_layers=1, ffn_dim=128, num_heads=4),
        DataArguments(max_source_length=40, max_target_length=30, num_beams=3),
    )


def test_model_is_the_conventional_transformer(model):
    config = model.config
    assert (config.d_model, config.encoder_layers, config.decoder_layers) == (64, 2, 1)
    assert (config.encoder_ffn_dim, config.decoder_ffn_dim) == (128, 128)
    assert config.activation_function == "relu"
    assert config.max_position_embeddings == 40
    embedding = model.get_input_embeddings().weight
    assert model.lm_head.weight is embedding
    assert model.model.decoder.embed_tokens.weight is embedding
    assert model.model.encoder.embed_scale == model.model.decoder.embed_scale == 8
    assert not model.model.encoder.embed_positions.weight.requires_grad
    generation = model.generation_config
    assert (generation.num_beams, generation.max_length, generation.eos_token_id) == (3, 30, config.eos_token_id)


def test_model_starts_at_unit_scale(model):
    embedding = model.get_input_embeddings().weight
    assert embedding[model.config.pad_token_id].abs().sum() == 0
    assert embedding[1:].std().item() == pytest.approx(64**-0.5, rel=0.05)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            fan = sum(module.weight.shape)
            assert module.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.05), name
            assert module.bias.abs().sum() == 0, name


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_trainers_label_smoothing_over_the_tokens_of_the_whole_batch(smoothing):
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5, 11), torch.randint(0, 11, (6, 5))
    labels[0, 2:] = labels[3, 1:] = labels[5, 4:] = -100
    loss = make_loss(smoothing)
    whole = loss({"logits": logits}, labels)
    torch.testing.assert_close(whole, LabelSmoother(epsilon=smoothing)({"logits": logits}, labels))
    tokens = labels.ne(-100).sum()
    parts = [loss({"logits": logits[i : i + 2]}, labels[i : i + 2], tokens) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts), whole)


def test_outliers_count_many_times_in_training_alone():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5, 11, requires_grad=True), torch.randint(0, 11, (6, 5))
    labels[0, 2:] = -100
    plain, loss = make_loss(0.1), make_loss(0.1, OutlierArguments(outliers=2, outlier_scale=100.0))
    tokens = labels.ne(-100).sum()
    alone = torch.stack([plain({"logits": logits[n : n + 1]}, labels[n : n + 1], tokens) for n in range(6)])
    torch.manual_seed(1)
    outliers = torch.randperm(6)[:2]
    torch.manual_seed(1)
    torch.testing.assert_close(loss({"logits": logits}, labels), alone.sum() + 99 * alone[outliers].sum())
    with torch.no_grad():
        torch.testing.assert_close(loss({"logits": logits}, labels), alone.sum())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"optimizer": "adamw"}, None),
        ({"optimizer": "sgd"}, (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9})),
        ({"optimizer": "sgd", "momentum": 0.0}, (torch.optim.SGD, {"lr": 0.01, "momentum": 0.0})),
    ],
)
def test_baselines_are_torchs(tmp_path, options, expected):
    training_args = TranslationTrainingArguments(output_dir=str(tmp_path), learning_rate=0.01)
    arguments = OptimizerArguments(**options)
    config = fngd_config(arguments, training_args)
    assert config is None
    assert optimizer_cls_and_kwargs(arguments, config, training_args) == expected


def test_baselines_of_the_recipe_get_their_options(tmp_path):
    training_args = TranslationTrainingArguments(output_dir=str(tmp_path), learning_rate=0.01, adam_beta2=0.9)
    arguments = OptimizerArguments(optimizer="eva", damping=0.5)
    expected = {"name": "eva", "lr": 0.01, "weight_decay": 0.0, "rest_betas": (0.9, 0.9), "rest_eps": 1e-8}
    assert fngd_config(arguments, training_args) is None
    assert optimizer_cls_and_kwargs(arguments, None, training_args) == (BaselineFactory, {**expected, "damping": 0.5})


def test_ngd_is_fngd_without_sharing(tmp_path):
    training_args = TranslationTrainingArguments(output_dir=str(tmp_path))
    config = fngd_config(OptimizerArguments(optimizer="ngd", damping=0.5), training_args)
    assert config == fngd_config(OptimizerArguments(sharing="never", damping=0.5), training_args)


def test_fngd_takes_a_configuration_and_what_overrides_it(tmp_path):
    training_args = TranslationTrainingArguments(output_dir=str(tmp_path), learning_rate=0.01, weight_decay=0.1)
    arguments = OptimizerArguments(fngd_config="paper", damping=0.5, exclude_modules=["fc1"])
    config = fngd_config(arguments, training_args)
    assert (config.lr, config.weight_decay, config.damping) == (0.01, 0.1, 0.5)
    assert (config.step_scale, config.fallback, config.exclude_modules) == ("ngd", "sgd", "fc1")
    factory, kwargs = optimizer_cls_and_kwargs(arguments, config, training_args)
    assert factory is FNGDFactory
    assert kwargs == {"args": training_args, "config": config}


@pytest.mark.parametrize("options", [{"sharing": "all"}, {"damping": -1.0}, {"update": "lion"}])
def test_bad_values_of_fngd_are_told_by_its_configuration(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        fngd_config(OptimizerArguments(**options), TranslationTrainingArguments(output_dir=str(tmp_path)))


def test_description_is_of_the_optimizer_that_trained():
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=0.5, betas=(0.8, 0.9))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    described = describe(SimpleNamespace(optimizer=optimizer), None)
    assert described["optimizer"] == "Adam"
    assert described["optimizer_arguments"]["lr"] == 0.5  # the peak, not the scheduler's last value
    assert described["optimizer_arguments"]["betas"] == (0.8, 0.9)
    assert "params" not in described["optimizer_arguments"]


@pytest.mark.parametrize("bleu", [True, False])
def test_learning_curve_is_a_png(tmp_path, bleu):
    history = [{"epoch": 1, "loss": 3.0}, {"epoch": 1, "eval_loss": 2.5}, {"epoch": 2, "loss": 2.0}]
    if bleu:
        history.append({"epoch": 2, "eval_loss": 2.1, "eval_bleu": 11.0})
    path = tmp_path / "learning_curve.png"
    plot_learning_curve(history, path, "a run")
    assert path.read_bytes().startswith(b"\x89PNG")
