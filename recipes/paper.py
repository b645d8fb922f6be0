"""The paper's comparison at its size, on one device and within a time: what is worth most comes first.

    python recipes/paper.py --minutes 25 --plan
    python recipes/paper.py --minutes 25 --dataset_name FOLDER
    python recipes/paper.py --toy

In this order: the tests on a CUDA device; what a step costs, in time and memory, in fp32 and bf16; the first steps of
every optimizer as it is, compiled and in CUDA graphs, of which the fastest goes on; one seed of every optimizer at the
middle of its grid, side by side on the one device; the grids, and the other seeds.

What is done is not done again: started again, the command goes on, and runs that the time cut off resume from their
last checkpoints. Their curves so far are in the pages too, dashed. `--plan` does nothing but say what would be done in
the time; it reckons with what ran before. `--toy` rehearses it all on a CPU, at toy size.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import step_cost
from common.command_line import words
from common.timer import hardware
from compare import assignments, run, write_page
from comparison.plan import RECIPES, Arm, Comparison, Run, Stage, in_words, load
from comparison.results import Results, best_points, value
from comparison.runner import Runner, code_version
from step_costs.report import progress

CONFIG = RECIPES / "configs" / "compare" / "multi30k.yaml"
TOY_ARMS = ["fngd", "adamw"]
ARMS = ["fngd", "fngd, the paper's", "adamw", "adamw, no warm-up", "sgd", "muon", "shampoo", "kfac"]
COMMON = {"bf16": True, "pad_to_multiple_of": 32, "dataloader_drop_last": True, "dataloader_persistent_workers": True}
FULL = {"per_device_eval_batch_size": 512, "dataloader_num_workers": 2}
# No dataset: the embedded corpus.
TOY = {"d_model": 32, "ffn_dim": 64, "encoder_layers": 1, "decoder_layers": 1, "num_heads": 2, "vocab_size": 300}
TOY |= {"dataset_name": None, "max_train_samples": 1280, "max_eval_samples": 36, "max_predict_samples": 32}
TOY |= {"num_train_epochs": 2, "use_cpu": True, "dataloader_num_workers": 1, "max_source_length": 32}
TOY |= {"max_target_length": 32, "per_device_eval_batch_size": 32}
TOY_SUITE = {"d_model": 16, "ffn_dim": 32, "layers": 1, "heads": 2, "vocab_size": 40, "batch_size": 4, "length": 4}
TOY_SUITE |= {"rounds": 2, "precision": "fp32", "arms": ["FNGD block_muon, clipped (the default)"]}
LEAST = 30  # seconds in which a part can do something
LOADING = 1.3  # seconds of training a second of steps: evaluation, data, checkpoints


@dataclass(frozen=True)
class Part:
    """A part of the work.

    Attributes:
        title: What it is.
        seconds: Estimates what is left of it.
        run: Does it until a value of `time.monotonic()`; returns the number of failures.
        share: The most of the whole time that it may take in one start.
    """

    title: str
    seconds: Callable[[], float]
    run: Callable[[float], int]
    share: float = 1.0


class Paper:
    """The parts, and what they share.

    Args:
        options: Of the command line.
        overrides: Options of all trainings.
    """

    def __init__(self, options: argparse.Namespace, overrides: dict[str, Any]) -> None:
        self.toy, self.folder, self.jobs = options.toy, options.results_dir, options.jobs
        self.grids = load(CONFIG, overrides, options.arms)
        self.results = Results(self.folder / f"{self.grids.name}.jsonl")
        # The modes of torch.compile; none: as it is.
        key = "torch_compile_backend" if self.toy else "torch_compile_mode"
        self.modes = [None, "aot_eager"] if self.toy else [None, "default", "reduce-overhead"]
        short = {"max_steps": 14 if self.toy else 60, "eval_strategy": "no", "save_strategy": "no", "do_eval": False}
        self.first = replace(
            self.grids,
            name="first_steps",
            metric="step_seconds_median",
            maximize=False,
            screen=Stage((0,), self.grids.final.options | short | {"do_predict": False}),
            arms={name: Arm(arm.options | middle(arm), {key: self.modes}) for name, arm in self.grids.arms.items()},
        )
        self.first_results = Results(self.folder / "first_steps.jsonl")

    def parts(self) -> list[Part]:
        """Return all parts, the one that is worth most first."""
        n, suite = len(self.grids.arms), f"{'cpu, ' if self.toy else ''}fp32 and bf16"
        return [
            Part("tests on a CUDA device", lambda: 0 if self._tested() else 20 if self.toy else 240, self._test),
            Part(f"cost and memory of a step, {suite}", self._suite_seconds, self._suite, 0.3),
            Part(f"first steps of {n} optimizers, as they are and compiled", self._first_seconds, self._first, 0.25),
            Part(f"one seed of {n} optimizers", lambda: self._seconds(self._one_seed()), self._train_one_seed),
            Part("grids and other seeds", lambda: self._seconds(self._compiled(self.grids)), self._train_grids),
        ]

    # Parts ----------------------------------------------------------------------------------------------------------

    def _tested(self) -> bool:
        log = self.folder / "cuda_tests.txt"
        return log.exists() and log.read_text(encoding="utf-8").endswith(f"passed, code {code_version()}\n")

    def _test(self, deadline: float) -> int:
        log = self.folder / "cuda_tests.txt"
        # Without the repository's own options: they want plugins that a machine with a GPU may lack.
        call = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-W", "ignore::pytest.PytestConfigWarning"]
        failed = _call([*call, "-p", "no:cacheprovider", "tests/test_cuda.py"], log, deadline)
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        print(f"   {lines[-1] if lines else 'no output'} ({log})", flush=True)
        if failed == 0:
            with log.open("a", encoding="utf-8") as file:
                file.write(f"passed, code {code_version()}\n")
        return failed or 0

    def _suite_file(self) -> Path:
        return self.folder / "step_cost.jsonl"

    def _suite_seconds(self) -> float:
        if self._suite_file().with_suffix(".md").exists():  # written when all is measured
            return 0
        done, seconds = progress(self._suite_file())
        left = len(step_cost.parse(self._suite_argv())[1]) - done
        return left * 4 if self.toy else left * (seconds / done if done else 60)

    def _suite_argv(self) -> list[str]:
        suite = ["--suite", "cpu" if self.toy else "cuda", f"--output={self._suite_file()}"]
        return [*suite, *words(TOY_SUITE if self.toy else {})]

    def _suite(self, deadline: float) -> int:
        call = [sys.executable, str(RECIPES / "step_cost.py"), *self._suite_argv()]
        failed = _call(call, self.folder / "step_cost.txt", deadline)
        print(f"   {progress(self._suite_file())[0]} settings measured ({self._suite_file()})", flush=True)
        return failed or 0

    def _first_runs(self) -> list[Run]:
        """All optimizers as they are come first: what is cut off then is the compiler."""
        return sorted(self.first.screen_runs(), key=lambda one: self.modes.index(*one.point.values()))

    def _first_seconds(self) -> float:
        if self.results.path.exists():  # what goes on is chosen once: other options would be other runs
            return 0
        todo = [one for one in self._first_runs() if not self.first_results.finished(one)]
        return len(todo) * (15 if self.toy else 90) / self.jobs

    def _first(self, deadline: float) -> int:
        Runner(self.first, self.first_results, self.folder / "runs", self.jobs, deadline).execute(self._first_runs())
        for arm, mode in best_points(self.first, self.first_results).items():
            print(f"   {arm} goes on with {in_words(mode)}", flush=True)
        return 0  # what cannot be compiled goes on as it is

    def _compiled(self, comparison: Comparison) -> Comparison:
        """Return a comparison with the mode of each optimizer that was fastest."""
        arms = dict(comparison.arms)
        for name, mode in best_points(self.first, self.first_results).items():
            options = {key: item for key, item in mode.items() if item is not None}
            arms[name] = replace(arms[name], options=arms[name].options | options)
        return replace(comparison, arms=arms)

    def _one_seed(self) -> Comparison:
        seeds = replace(self.grids.final, seeds=self.grids.final.seeds[:1])
        arms = {
            name: replace(arm, grid={key: [item] for key, item in middle(arm).items()})
            for name, arm in self.grids.arms.items()
        }
        return self._compiled(replace(self.grids, name="one_seed", final=seeds, arms=arms))

    def _train_one_seed(self, deadline: float) -> int:
        return self._train(self._one_seed(), deadline)

    def _train_grids(self, deadline: float) -> int:
        return self._train(self._compiled(self.grids), deadline)

    def _train(self, comparison: Comparison, deadline: float) -> int:
        failed = run(Runner(comparison, self.results, self.folder / "runs", self.jobs, deadline))
        write_page(comparison, self.results, self.folder)
        return failed

    # Estimates ------------------------------------------------------------------------------------------------------

    def _seconds(self, comparison: Comparison) -> float:
        """Estimate what the runs of a comparison that are left take, side by side."""
        points = {name: middle(arm) for name, arm in comparison.arms.items()} | best_points(comparison, self.results)
        runs = [*comparison.screen_runs(), *comparison.final_runs(points)]
        left = {one.key: self._steps_left(one) * self._pace(one.arm) for one in runs}
        return sum(left.values()) * LOADING / self.jobs

    def _steps_left(self, one: Run) -> float:
        if self.results.finished(one):
            return 0
        record = self.results.unfinished(one)
        if record is not None and record["max_steps"]:
            return float(record["max_steps"] - record["step"])
        return one.options["num_train_epochs"] * (20 if self.toy else 453)  # Multi30K's, in batches of 64

    def _pace(self, arm: str) -> float:
        """Return the seconds of a step, side by side with the others: measured last, or in the first steps, or 0.12."""
        found = [value(record, "step_seconds_mean") for record in self.results.of_arm(arm)]
        first = [value(record, "step_seconds_median") for record in self.first_results.of_arm(arm)]
        known = [seconds for seconds in found if seconds][-1:] or [seconds for seconds in first if seconds]
        return min(known, default=0.12)


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the time allows; return 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=25, help="time; start again to go on")
    parser.add_argument("--plan", action="store_true", help="print what would be done, and do nothing")
    parser.add_argument("--toy", action="store_true", help="rehearse on a CPU, at toy size")
    parser.add_argument("--dataset_name", help="folder or Hub id of Multi30K; default: bentrevett/multi30k")
    parser.add_argument(
        "--arms", nargs="+", metavar="ARM", help="these optimizers of the comparison, not the eight (or two)"
    )
    parser.add_argument("--jobs", type=int, help="trainings side by side; default: all arms, at toy size the cores")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="options of all trainings")
    parser.add_argument("--results_dir", type=Path, help="default: outputs/paper, or outputs/paper_toy")
    options = parser.parse_args(argv)
    if not options.minutes > 0:
        parser.error(f"--minutes is {options.minutes}; it must be above 0.")
    if not (options.toy or options.plan or torch.cuda.is_available()):
        parser.error(f"torch {torch.__version__} finds no CUDA device here; --toy rehearses on a CPU.")
    start = time.monotonic()
    options.arms = options.arms or (TOY_ARMS if options.toy else ARMS)
    options.jobs = options.jobs or (os.cpu_count() or 1 if options.toy else len(options.arms))
    options.results_dir = (options.results_dir or Path("outputs", "paper_toy" if options.toy else "paper")).resolve()
    overrides = COMMON | (TOY if options.toy else FULL) | assignments(parser, options.set)
    overrides |= {"dataset_name": options.dataset_name} if options.dataset_name else {}
    paper = Paper(options, overrides)
    parts, failed = paper.parts(), 0
    print_plan(parts, options.minutes, f"{hardware()}, {options.jobs} trainings side by side")
    for number, part in enumerate(() if options.plan else parts, 1):
        left = start + 60 * options.minutes - time.monotonic()
        if left < LEAST:
            break
        if part.seconds() > 0:
            print(f"{number}. {part.title}, {left / 60:.1f} minutes left", flush=True)
            failed += part.run(time.monotonic() + min(left, 60 * options.minutes * part.share))
    if not options.plan:
        print_plan(parts, options.minutes, f"of another start; this one took {(time.monotonic() - start) / 60:.1f}")
    return 1 if failed else 0


def middle(arm: Arm) -> dict[str, Any]:
    """Return the middle of an optimizer's grid."""
    return arm.points()[len(arm.points()) // 2]


def print_plan(parts: Sequence[Part], minutes: float, what: str) -> None:
    """Print how long every part takes by estimate, and how much of that fits in."""
    left = minutes
    print(f"{minutes:g} minutes ({what}), by estimate:")
    for number, part in enumerate(parts, 1):
        needs = part.seconds() / 60
        gets = min(needs, left, minutes * part.share)
        left -= gets
        print(f"  {number}. {part.title}: {f'{gets:.1f} of {needs:.1f} minutes' if needs else 'done'}", flush=True)


def _call(call: Sequence[str], log: Path, deadline: float) -> int | None:
    """Run a command; return whether it failed, None if it was cut off."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        try:
            code = subprocess.run(
                call, stdout=output, stderr=subprocess.STDOUT, cwd=RECIPES.parent, timeout=deadline - time.monotonic()
            ).returncode
        except subprocess.TimeoutExpired:
            return None
    if code:
        print(f"   exit code {code} (see {log})", flush=True)
    return int(code != 0)


if __name__ == "__main__":
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a child must not outlive its parent
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Stopped; start again to go on.")
