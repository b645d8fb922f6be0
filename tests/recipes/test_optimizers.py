"""The optimizers of the recipes: what Trainer is handed, and what is reported of it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from baselines import BaselineFactory
from common.arguments import OptimizerArguments, TextTrainingArguments, parse
from common.optimizers import fngd_config, optimizer_cls_and_kwargs, what_trained
from hf_fngd import FNGD, FNGDConfig, FNGDFactory
from tests.nets import net
from translation.arguments import TranslationTrainingArguments


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
    arguments = OptimizerArguments(optimizer="eva", damping=0.5, fallback_lr=0.03)
    expected = {"name": "eva", "lr": 0.01, "weight_decay": 0.0, "rest_betas": (0.9, 0.9), "rest_eps": 1e-8}
    expected |= {"damping": 0.5, "fallback_lr": 0.03}
    assert fngd_config(arguments, training_args) is None
    assert optimizer_cls_and_kwargs(arguments, None, training_args) == (BaselineFactory, expected)


@pytest.mark.parametrize("rates", [{}, {"fallback_lr": 0.03}])
def test_a_baselines_rest_may_have_a_rate_of_its_own(rates):
    optimizer = BaselineFactory()(net(), name="kfac", lr=0.01, **rates)
    found = {type(part).__name__: {group["lr"] for group in part.param_groups} for part in optimizer.optimizers}
    assert found == {"KFAC": {0.01}, "AdamW": {rates.get("fallback_lr", 0.01)}}


def test_ngd_is_fngd_without_sharing(tmp_path):
    training_args = TranslationTrainingArguments(output_dir=str(tmp_path))
    config = fngd_config(OptimizerArguments(optimizer="ngd", damping=0.5), training_args)
    assert config == fngd_config(OptimizerArguments(sharing="never", damping=0.5), training_args)


def test_fngd_takes_a_configuration_and_what_overrides_it(tmp_path):
    training_args = TranslationTrainingArguments(output_dir=str(tmp_path), learning_rate=0.01, weight_decay=0.1)
    arguments = OptimizerArguments(fngd_config="paper", damping=0.5, exclude_modules=["fc1"])
    config = fngd_config(arguments, training_args)
    assert (config.lr, config.weight_decay, config.damping) == (0.01, 0.1, 0.5)
    assert (config.sharing, config.fallback, config.exclude_modules) == ("replay", "sgd", "fc1")
    factory, kwargs = optimizer_cls_and_kwargs(arguments, config, training_args)
    assert factory is FNGDFactory
    assert kwargs == {"args": training_args, "config": config}


@pytest.mark.parametrize("options", [{"sharing": "all"}, {"damping": -1.0}, {"update": "lion"}])
def test_bad_values_of_fngd_are_told_by_its_configuration(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        fngd_config(OptimizerArguments(**options), TranslationTrainingArguments(output_dir=str(tmp_path)))


def test_description_is_of_the_arguments_that_fngd_trained_with(tmp_path):
    args = TranslationTrainingArguments(output_dir=str(tmp_path), adam_beta1=0.8, adam_beta2=0.95, learning_rate=0.02)
    options = OptimizerArguments(update="adam")
    cls, kwargs = optimizer_cls_and_kwargs(options, fngd_config(options, args), args)
    described = what_trained(SimpleNamespace(optimizer=cls()(nn.Linear(2, 2), **kwargs)))
    assert described["optimizer"] == "FNGD"
    found = described["optimizer_arguments"]
    assert (found["momentum"], found["beta2"], found["lr"]) == (0.8, 0.95, 0.02)


@pytest.mark.parametrize(("given", "expected"), [({}, (0.02, 0.3)), ({"learning_rate": 0.05}, (0.05, 0.3))])
def test_learning_rate_and_weight_decay_of_a_file_of_settings_count_unless_others_are_given(tmp_path, given, expected):
    FNGDConfig(lr=0.02, weight_decay=0.3).save_pretrained(tmp_path / "config")
    args = TranslationTrainingArguments(output_dir=str(tmp_path), **given)
    config = fngd_config(OptimizerArguments(fngd_config=str(tmp_path / "config")), args)
    assert (config.lr, config.weight_decay) == expected
    assert fngd_config(OptimizerArguments(fngd_config="paper"), args).lr == args.learning_rate


def test_description_is_of_the_optimizer_that_trained():
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=0.5, betas=(0.8, 0.9))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    described = what_trained(SimpleNamespace(optimizer=optimizer))
    assert described["optimizer"] == "Adam"
    assert described["optimizer_arguments"]["lr"] == 0.5  # the peak, not the scheduler's last value
    assert described["optimizer_arguments"]["betas"] == (0.8, 0.9)
    assert "params" not in described["optimizer_arguments"]


def test_an_option_that_was_set_counts_though_it_is_the_default(tmp_path):
    FNGDConfig(lr=5e-3).save_pretrained(tmp_path / "config")
    argv = ["--output_dir=out", "--use_cpu=true", f"--fngd_config={tmp_path / 'config'}"]
    for more, expected in (([], 5e-3), (["--learning_rate=1e-3"], 1e-3), (["--learning_rate", "2e-3"], 2e-3)):
        options, args = parse([OptimizerArguments, TextTrainingArguments], [*argv, *more])
        config = fngd_config(options, args)
        assert FNGD.from_training_args(nn.Linear(2, 2), args, config).config.lr == expected


def test_two_options_for_one_thing_agree():
    argv = ["--output_dir=out", "--use_cpu=true", "--momentum=0.95"]
    options, args = parse([OptimizerArguments, TextTrainingArguments], [*argv, "--adam_beta1=0.95"])
    assert fngd_config(options, args).momentum == 0.95
    options, args = parse([OptimizerArguments, TextTrainingArguments], [*argv, "--adam_beta1=0.9"])
    with pytest.raises(ValueError, match=r"--momentum is 0\.95 and --adam_beta1 is 0\.9: leave out one"):
        fngd_config(options, args)
