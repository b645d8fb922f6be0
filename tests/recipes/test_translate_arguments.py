"""Options of the translation recipe: types, precedence, and errors that name the fix."""

import dataclasses
from pathlib import Path

import pytest

from common.arguments import OptimizerArguments
from common.arguments import parse as parse_words
from common.optimizers import fngd_config
from hf_fngd import FNGDConfig
from translation.arguments import DATACLASSES

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"


def parse(tmp_path, text="", argv=()):
    """Parse the options of a YAML text and a command line into one dictionary."""
    file = tmp_path / "options.yaml"
    file.write_text(text, encoding="utf-8")
    groups = parse_words(DATACLASSES, ["--config", str(file), f"--output_dir={tmp_path}", *argv])
    return {f.name: getattr(group, f.name) for group in groups for f in dataclasses.fields(group)}


@pytest.mark.parametrize(
    ("text", "argv", "expected"),
    [
        ("", [], {"d_model": 512, "optimizer": "fngd", "label_smoothing_factor": 0.1, "dataset_name": None}),
        ("d_model: 64", [], {"d_model": 64}),
        ("d_model: 64", ["--d_model", "32"], {"d_model": 32}),
        ("d_model: 64", ["--d-model=32"], {"d_model": 32}),
        ("learning_rate: 3e-3", [], {"learning_rate": 0.003}),  # YAML 1.1 reads a string
        ("predict_with_generate: true", [], {"predict_with_generate": True}),
        ("predict_with_generate: true", ["--predict_with_generate", "false"], {"predict_with_generate": False}),
        ("predict_with_generate: yes", [], {"predict_with_generate": True}),
        ("do_predict: false", [], {"do_predict": False}),
        ("max_train_samples: null", [], {"max_train_samples": None}),
        ("target_modules: [fc1, fc2]", [], {"target_modules": ["fc1", "fc2"]}),
        ("target_modules: [fc1, fc2]", ["--target_modules", "q_proj"], {"target_modules": ["q_proj"]}),
        ("lr_scheduler_kwargs: {num_cycles: 2}", [], {"lr_scheduler_kwargs": {"num_cycles": 2}}),
        ("damping: 1e-4\nsharing: replay", ["--sharing", "never"], {"damping": 0.0001, "sharing": "never"}),
        ("strict: true", [], {"strict": True}),
        ("optimizer: sgd\nmomentum: 0.5", [], {"optimizer": "sgd", "momentum": 0.5}),
    ],
)
def test_command_line_wins_over_file_and_values_are_typed(tmp_path, text, argv, expected):
    options = parse(tmp_path, text, argv)
    assert {name: options[name] for name in expected} == expected
    assert all(type(options[name]) is type(value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        ("d_modell: 64", [], r"options\.yaml: d_modell \(did you mean d_model"),
        ("d-model: 64", [], r"options\.yaml: d-model \(did you mean d_model"),
        ("dampng: 1\nzzz: 1", [], r"dampng \(did you mean damping.*zzz\. `--help`"),
        ("", ["--num_beam=3"], r"command line: --num_beam=3 \(did you mean num_beams"),  # no abbreviations
        ("", ["configs/a.yaml", "--d_model=8"], r"named by --config: --config configs/a\.yaml"),
        ("", ["--dampign", "3"], r"command line: --dampign \(did you mean damping"),
        ("", ["stray"], r"command line: stray"),
        ("- d_model", [], "holds a list"),
        ("d_model: 30\nnum_heads: 4", [], "num_heads=4 does not divide d_model=30"),
        ("dropout: 1.0", [], "dropout is 1.0"),
        ("num_beams: 0", [], "num_beams is 0"),
        ("pad_to_multiple_of: 0", [], "pad_to_multiple_of is 0"),
        ("pad_to_multiple_of: 48", [], "pad_to_multiple_of=48 must divide max_source_length=128"),
        ("max_eval_samples: 0", [], "max_eval_samples is 0"),
        ("source_lang: de", [], "both 'de'"),
        ("optimizer: adamw\ndamping: 0.1", [], "--optimizer adamw has no use for --damping"),
        ("optimizer: adamw", ["--momentum=0.5"], "--optimizer adamw has no use for --momentum"),
        ("optimizer: sgd", ["--fngd_config=paper"], "--optimizer sgd has no use for --fngd_config"),
        ("optimizer: kfac", ["--sharing=replay"], "kfac has no use for --sharing.*takes momentum, damping, kl_clip"),
        ("optimizer: muon", ["--inverse_every=5"], "muon has no use for --inverse_every"),
        ("kl_clip: 0.1", [], "--optimizer fngd has no use for --kl_clip"),
        ("optimizer: ngd", ["--sharing=replay"], "ngd is fngd with --sharing never, not replay"),
        ("optim: sgd", [], "Set --optimizer instead of --optim sgd"),
        ("generation_num_beams: 4", [], "Set --num_beams instead of --generation_num_beams"),
        ("do_train: false", [], "always trains"),
        ("average_checkpoints: 0", [], "average_checkpoints is 0"),
        ("average_checkpoints: 2", [], "needs --save_total_limit 2 or more; it is 1"),
        ("average_checkpoints: 2\nsave_strategy: best\nmetric_for_best_model: loss", [], "set --save_strategy epoch"),
        ("average_checkpoints: 2\nsave_strategy: 'no'", [], "set --save_strategy epoch or steps"),
        ("average_checkpoints: 2\nsave_total_limit: 2", ["--metric_for_best_model=loss"], "--save_total_limit 3"),
        ("average_checkpoints: 2\nload_best_model_at_end: true", [], "leave out --load_best_model_at_end"),
    ],
)
def test_bad_options_name_the_fix(tmp_path, text, argv, message):
    with pytest.raises(ValueError, match=message):
        parse(tmp_path, text, argv)


@pytest.mark.parametrize("text", ["d_model: wide", "optimizer: adam", "predict_with_generate: maybe"])
def test_values_of_the_wrong_type_end_the_program(tmp_path, capsys, text):
    with pytest.raises(SystemExit):
        parse(tmp_path, text)
    assert text.split(":")[0] in capsys.readouterr().err


def test_every_key_of_the_optimizers_configuration_is_an_option():
    options = {f.name: f for f in dataclasses.fields(OptimizerArguments)}
    others = {"optimizer", "fngd_config", "kl_clip", "statistics_every", "inverse_every"}
    no_options = ("lr", "weight_decay", "param_groups")  # the former are TrainingArguments', the last is for files
    keys = {f.name: f for f in dataclasses.fields(FNGDConfig) if f.name not in no_options}
    assert options.keys() - others == keys.keys()
    for name, key in keys.items():
        assert key.metadata["help"] in options[name].metadata["help"]
        assert options[name].default is None


def test_a_list_of_one_is_a_name_or_an_expression(tmp_path):
    argv = [f"--output_dir={tmp_path}", "--target_modules", ".*fc1", "--exclude_modules", "a", "b", "--eps=1e-6"]
    overrides = parse_words(DATACLASSES, argv)[2].overrides()
    assert overrides == {"target_modules": ".*fc1", "exclude_modules": ["a", "b"], "eps": 1e-6}


@pytest.mark.parametrize("names", [["linear"], ["linear", "conv1d"]])
def test_layer_types_are_a_list_of_any_length(tmp_path, names):
    _, _, optimizer, training = parse_words(DATACLASSES, [f"--output_dir={tmp_path}", "--layer_types", *names])
    assert list(fngd_config(optimizer, training).layer_types) == names


@pytest.mark.parametrize("name", ["quickstart", "multi30k_small", "multi30k"])
def test_configs_parse_and_build(name):
    data, model, optimizer, training = parse_words(DATACLASSES, ["--config", str(CONFIGS / f"{name}.yaml")])
    assert training.output_dir == f"outputs/{name}"
    assert data.dataset_name == (None if name == "quickstart" else "bentrevett/multi30k")
    assert (model.d_model, model.encoder_layers) == ((512, 6) if name == "multi30k" else (128, 2))
    assert fngd_config(optimizer, training).lr == training.learning_rate
