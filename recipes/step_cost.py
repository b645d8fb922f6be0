"""What a step costs: medians of interleaved steps, memory, and the operations that each kind of step is made of.

    python recipes/step_cost.py
    python recipes/step_cost.py --d_model 512 --ffn_dim 2048 --layers 6 --heads 8
    python recipes/step_cost.py --model gpt2 --d_model 768 --ffn_dim 3072 --layers 12 --heads 12 --batch_size 8 \
        --length 1024 --vocab_size 50257 --precision bf16
    python recipes/step_cost.py --suite cuda --output outputs/step_cost.jsonl --plot outputs/step_cost.png

All arms train copies of one model on one batch, one step each in turn, so that a change of the machine's speed
meets all of them; what counts is the ratio to SGD with momentum, or to AdamW: of the medians for steps of one kind, of
the means for optimizers that do more in one step of 10 or 100 (whose period `--rounds` has to hold). Beside the ratio
stands what the operations of `step_costs/cost_model.py` let expect.

`--suite` measures every setting of a list in `recipes/configs/step_cost.yaml`. A setting that is in the output file is
not measured again: started again, the command goes on where it was stopped. In the end it writes all tables beside the
output file, as Markdown. Options that are given beside it replace those of every setting.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from common.command_line import words
from common.jsonl import append_lines
from step_costs.arms import ARMS, available
from step_costs.measure import measure
from step_costs.models import IMAGE_MODELS, MODELS
from step_costs.report import measured, plot, section

SUITES = Path(__file__).parent / "configs" / "step_cost.yaml"
PRECISIONS = {"cpu": ["fp32"], "cuda": ["fp32", "bf16"]}
_ABOUT_FILES = ("arms", "suite", "output", "plot")  # options that are no part of a setting


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options, runs = parse(sys.argv[1:] if argv is None else argv)
    if any(run.device.startswith("cuda") for run in runs) and not torch.cuda.is_available():
        make_parser().error(f"--device cuda: torch {torch.__version__} finds no CUDA device here.")
    settings, found, sections = [], [], []
    for run in runs:
        setting = setting_of(run)
        arms = available(run.arms, images=run.model in IMAGE_MODELS)
        records = measured(run.output, setting, arms) if run.suite else []
        if not records:
            records = measure(run, arms)
            gc.collect()  # the models, which hold themselves, before the next ones are made
            if run.output:
                append_lines(run.output, [{**setting, **record} for record in records])
        settings.append(setting)
        found.append(records)
        sections.append(section(setting, records))
        print(sections[-1], flush=True)
    if options.suite:
        options.output.with_suffix(".md").write_text("\n".join(sections), encoding="utf-8")
    if options.plot:
        plot(options.plot, settings, found)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[argparse.Namespace]]:
    """Return the options, and what they measure: the settings of the suite, each once, or themselves."""
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.suite and not options.output:
        parser.error("--suite needs --output FILE.jsonl, where it goes on after an interruption.")
    runs = [options]
    if options.suite:
        suite = yaml.safe_load(SUITES.read_text(encoding="utf-8"))[options.suite]
        runs = [
            parser.parse_args([*words({"device": options.suite, "precision": precision} | setting), *argv])
            for setting in suite
            for precision in PRECISIONS[options.suite]
        ]
        runs = [run for i, run in enumerate(runs) if setting_of(run) not in map(setting_of, runs[:i])]
    for run in runs:
        if run.rounds < 1:
            parser.error(f"--rounds is {run.rounds}; it must be at least 1.")
    return options, runs


def setting_of(run: argparse.Namespace) -> dict[str, Any]:
    """Return the options that are part of a setting."""
    return {key: value for key, value in vars(run).items() if key not in _ABOUT_FILES}


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    sizes = "resnet32, vgg11: of a size of their own, --length pixels a side"
    parser.add_argument("--model", choices=[*MODELS, *IMAGE_MODELS], default="marian", help=sizes)
    parser.add_argument("--d_model", type=int, default=128)
    parser.add_argument("--ffn_dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2, help="marian: of the encoder, and of the decoder")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=8000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--length", type=int, default=16, help="tokens; marian: of source and target")
    parser.add_argument(
        "--lora_r", type=int, help="train LoRA adapters of this rank, on all Linear but the output layers"
    )
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32", help="bf16: by autocast")
    parser.add_argument("--compile", action="store_true", help="run the models through torch.compile")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    yardsticks = "beside SGD-m and AdamW, by default all: " + "; ".join(ARMS)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=yardsticks)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="append the results to this file, one line of JSON an arm")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the ratios")
    parser.add_argument("--suite", choices=PRECISIONS, help=f"measure all settings of configs/{SUITES.name}")
    return parser


if __name__ == "__main__":
    main()
