"""The file of measured settings, and tables and bars of it."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure  # no pyplot: it would look for a display

from common.jsonl import read_lines
from comparison.markdown import table
from step_costs.arms import ADAMW, SGD
from step_costs.measure import WATCHED, Record, machine
from step_costs.models import IMAGE_MODELS

Settings = Mapping[str, Any]


def measured(path: Path, settings: Settings, arms: Sequence[str]) -> list[Record]:
    """The arms of the last run of a setting on this machine in the file; none where it did not have all of these arms.

    Lines are older than some options, and the oldest do not name their machine.
    """
    found: dict[str, Record] = {}
    for record in read_lines(path):
        here = all(record.get(name, value) == value for name, value in machine().items())
        if here and all(record.get(name) == value for name, value in settings.items()):
            if record["arm"] == SGD:  # the first one of a run
                found = {}
            found[record["arm"]] = record
    return [found[arm] for arm in arms] if found.keys() >= set(arms) else []


def progress(path: Path) -> tuple[int, float]:
    """The settings in the file, and the seconds that their steps took."""
    records = list(read_lines(path))
    return sum(r["arm"] == SGD for r in records), sum(sum(r["milliseconds"]) for r in records) / 1000


def section(settings: Settings, records: Sequence[Record]) -> str:
    """What was measured, and its table."""
    head = ["step", "ratio of medians", "ratio of means", "quartiles", "over AdamW", "predicted"]
    head += ["state, bytes a parameter", "of matrices", "peak of a step, MiB"]
    head += [name.removeprefix("aten::") for name in WATCHED]
    rows = []
    for record in records:
        low, high = quartiles(record, records)
        predicted = "-" if record["predicted"] is None else f"{record['predicted']:.2f}"
        cells = [f"{record[name]:.2f}" for name in ("ratio_of_medians", "ratio_of_means")]
        cells += [f"{low:.2f} to {high:.2f}", f"{record['ratio_to_adamw']:.2f}", predicted]
        cells += [f"{record[name]:.1f}" for name in ("state_bytes", "matrix_state_bytes")] + [
            f"{record['peak_mib']:.0f}"
        ]
        rows.append([record["arm"], *cells, *(str(record["operations"].get(name, 0)) for name in WATCHED)])
    last = f"SGD-m: {median(records):.1f} ms a step, median of {settings['rounds']}; "
    last += f"{records[0]['parameters'] / 1e6:.1f}M trained parameters."
    last += f" {records[0]['hardware']}, torch {records[0]['torch']}." if "hardware" in records[0] else ""
    return f"{caption(settings)}:\n\n{table(head, rows)}\n\n{last}\n"


def caption(settings: Settings) -> str:
    """A setting in a line."""
    if settings["model"] in IMAGE_MODELS:
        found = "{model}, batches of {batch_size} images of {length} x {length} pixels, {precision}, {device}"
    else:
        found = "{model}, d {d_model}, feed-forward layers of {ffn_dim}, {layers} layers, {heads} heads, {vocab_size} "
        found += "tokens in the vocabulary, batches of {batch_size} x {length}, {precision}, {device}"
    if settings["lora_r"] is not None:
        found += ", LoRA of rank {lora_r}"
    compiled = ", compiled" if settings["compile"] else ""
    threads = f", threads: {settings['threads']}" if settings["device"] == "cpu" else ""
    return found.format(**settings) + compiled + threads


def plot(path: Path, settings: Sequence[Settings], runs: Sequence[Sequence[Record]]) -> None:
    """Draw the ratios of medians to SGD-m as bars, with quartiles and predictions; a panel a setting."""
    heights = [1 + 0.25 * len(records) for records in runs]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    panels = figure.subplots(len(runs), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, setting, records in zip(panels, settings, runs, strict=True):
        names = [record["arm"] for record in records]
        ratios = [record["ratio_of_medians"] for record in records]
        bounds = zip(*(quartiles(record, records) for record in records), strict=True)
        errors = [[abs(ratio - x) for ratio, x in zip(ratios, of_all, strict=True)] for of_all in bounds]
        axes.barh(names, ratios, xerr=errors, color="tab:blue", alpha=0.8, ecolor="0.3")
        known = [(record["predicted"], record["arm"]) for record in records if record["predicted"] is not None]
        axes.plot(*zip(*known, strict=True), "D", color="tab:orange", markersize=4, label="predicted by operations")
        adamw = next(record["ratio_of_medians"] for record in records if record["arm"] == ADAMW)
        axes.axvline(adamw, color="0.3", linestyle=":", linewidth=1, label=ADAMW)
        axes.invert_yaxis()
        axes.set(xlabel="step over SGD-m's, median and quartiles")
        axes.set_title(textwrap.fill(caption(setting), 90), fontsize=7)
        axes.grid(axis="x", alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=120)


def median(records: Sequence[Record]) -> float:
    """SGD-m's, in milliseconds."""
    return statistics.median(next(record["milliseconds"] for record in records if record["arm"] == SGD))


def quartiles(record: Record, records: Sequence[Record]) -> tuple[float, float]:
    """The lower and the upper quartile of an arm's steps over SGD-m's median."""
    times = record["milliseconds"]
    low, _, high = statistics.quantiles(times if len(times) > 1 else times * 2, n=4)
    return low / median(records), high / median(records)
