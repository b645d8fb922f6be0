"""Compare optimizers on a recipe: screen each one's grid on one seed, then run its best point on several.

    python recipes/compare.py recipes/configs/compare/smoke.yaml --jobs 2
    python recipes/compare.py recipes/configs/compare/smoke.yaml --report

Each run is a process of the recipe. Those that finished are appended to recipes/results/NAME.jsonl and never repeated;
started again, the command goes on where it was stopped. With `--minutes` it stops by itself: the runs that it cuts off
are appended with their curves so far, and resume at the next start. In the end, or at once with `--report`, it writes
NAME.md and NAME.png beside. The exit code is 1 if a run failed.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from comparison.plan import RECIPES, Comparison, Run, load
from comparison.plot import plot
from comparison.report import report
from comparison.results import Results, best_points
from comparison.runner import Runner


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, report, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("config", type=Path, help="YAML file of the comparison")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, on one device")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long; start again to go on")
    parser.add_argument("--report", action="store_true", help="run nothing, write the report of what has finished")
    parser.add_argument("--list", action="store_true", help="run nothing, print the runs and which have finished")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these optimizers")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="options of all runs, over those of the file"
    )
    parser.add_argument("--results_dir", type=Path, default=RECIPES / "results", help="folder of the result files")
    parser.add_argument("--output_dir", type=Path, help="folder of the runs; by default outputs/compare/NAME")
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}; it must be at least 1.")
    deadline = time.monotonic() + 60 * options.minutes
    overrides = assignments(parser, options.set)
    comparison = load(options.config, overrides, options.arms)
    results = Results(options.results_dir / f"{comparison.name}.jsonl")
    if options.list:
        _print_plan(comparison, results)
        return 0
    failed = 0
    if not options.report:
        output_dir = options.output_dir or Path("outputs", "compare", comparison.name)
        failed = run(Runner(comparison, results, output_dir, options.jobs, deadline))
    if options.report and not any(map(results.finished, every_run(load(options.config, overrides), results))):
        parser.error(f"{results.path} has no finished run of these options: the page would be empty. Mind --set.")
    write_page(load(options.config, overrides), results, options.results_dir)  # of all arms
    return 1 if failed else 0


def every_run(comparison: Comparison, results: Results) -> list[Run]:
    """Return the runs of the screening, and the final ones that are known by now."""
    return comparison.screen_runs() + comparison.final_runs(best_points(comparison, results))


def write_page(comparison: Comparison, results: Results, folder: Path) -> None:
    """Write the report, NAME.md, and the curves, NAME.png, into a folder."""
    page = folder / f"{comparison.name}.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(report(comparison, results), encoding="utf-8")
    plot(comparison, results, page.with_suffix(".png"))
    print(f"Wrote {page} and {page.with_suffix('.png').name}.")


def run(runner: Runner) -> int:
    """Do both stages; return the number of runs that failed."""
    comparison, results = runner.comparison, runner.results
    # A child must not outlive its parent: nobody would record it, and the next start would run beside it.
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        failed = runner.execute(comparison.screen_runs())
        best = best_points(comparison, results)
        for arm in comparison.arms:
            if arm not in best and time.monotonic() < runner.deadline:
                print(f"{arm}: no grid point finished with a number; it has no final runs.")
        return failed + runner.execute(comparison.final_runs(best))
    finally:
        signal.signal(signal.SIGTERM, former)


def _print_plan(comparison: Comparison, results: Results) -> None:
    best = best_points(comparison, results)
    for one in every_run(comparison, results):
        state = "finished" if results.finished(one) else "failed" if results.failed(one) else "to do"
        state = "cut off" if results.unfinished(one) else state
        print(f"{state:8} {one}")
    unknown = [arm for arm in comparison.arms if arm not in best]
    if unknown:
        print(f"{len(comparison.final.seeds)} final runs each of {', '.join(unknown)}, when their grids are screened")


def assignments(parser: argparse.ArgumentParser, pairs: Sequence[str]) -> dict[str, Any]:
    """Return the options of `--set`."""
    values = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign:
            parser.error(f"--set {pair}: write NAME=VALUE.")
        values[name] = yaml.safe_load(text)
    return values


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Stopped; start again to go on.")
