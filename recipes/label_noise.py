"""Label noise: what the weights do for an MLP on CIFAR-10 with a part of its labels replaced at random.

    python recipes/label_noise.py --dataset_name uoft-cs/cifar10 --output_dir outputs/label_noise

Every run appends one line to ``results.jsonl`` in the output folder; runs that are there already are not run
again. ``table.md`` is written from those of the same settings.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from hf_fngd import FNGD
from hf_fngd.sharing import INDEX_COLUMN

# What is compared: AdamW's update, and Muon's, on gradients weighted in different ways.
ARMS: dict[str, dict[str, Any]] = {
    "w = 1 (AdamW)": {"sharing": "uniform", "refresh": 0, "coefficient_steps": 1},
    "recomputed every step": {"sharing": "never"},
    "ranked, every 10th step": {"sharing": "ranked", "refresh": 10},
    "ranked, every 50th step": {"sharing": "ranked", "refresh": 50},
    "index, every 5th step": {"sharing": "index", "refresh": 5},
    "index, every 10th step": {"sharing": "index", "refresh": 10},
    "ranked, first epoch only": {"sharing": "ranked", "refresh": 0, "coefficient_steps": 10**6},
    "replay, first epoch only (the paper's)": {"sharing": "replay", "refresh": 0, "coefficient_steps": 10**6},
    "Muon, w = 1": {"update": "muon", "sharing": "uniform", "refresh": 0, "coefficient_steps": 1},
    "Muon, recomputed every step": {"update": "muon", "sharing": "never"},
    "Muon, ranked, every 10th step (preset robust)": {"update": "muon", "sharing": "ranked", "refresh": 10},
}
# What all runs of a table have in common.
SETTINGS = ("noise", "epochs", "batch_size", "max_train_samples")


class Perceptron(nn.Module):
    """768-512-512-10 with ReLU, the input standardized."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(768, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits ``[N, 10]`` from images ``[N, 768]``."""
        logits: Tensor = self.layers(pixel_values)
        return logits


def load_images(name: str, split: str, limit: int | None) -> tuple[Tensor, Tensor]:
    """Images averaged down to 16 x 16, standardized, ``[n, 768]``, and labels ``[n]``."""
    data = datasets.load_dataset(name, split=split)
    if limit is not None:
        data = data.shuffle(seed=0).select(range(min(limit, len(data))))
    columns = [c for c in ("img", "image") if c in data.column_names]
    if not columns or "label" not in data.column_names:
        raise ValueError(f"{name} needs the columns 'img' (or 'image') and 'label', it has {data.column_names}")
    images = np.stack([np.asarray(image.convert("RGB")) for image in data[columns[0]]])
    pixels = torch.from_numpy(images).float().permute(0, 3, 1, 2) / 255
    pixels = nn.functional.avg_pool2d(pixels, 2).flatten(1)
    return (pixels - 0.473) / 0.25, torch.tensor(data["label"])


def corrupt(labels: Tensor, share: float, seed: int) -> Tensor:
    """Replace a share of the labels by uniformly random ones (some of which are right by chance)."""
    generator = torch.Generator().manual_seed(1000 + seed)
    hit = torch.rand(len(labels), generator=generator) < share
    return torch.where(hit, torch.randint(10, labels.shape, generator=generator), labels)


def train(
    arm: str, lr: float, damping: float, seed: int, data: dict[str, Tensor], options: argparse.Namespace
) -> dict[str, Any]:
    """One training; returns its figures."""
    torch.manual_seed(seed)
    inputs, labels = data["train"], corrupt(data["labels"], options.noise, seed)
    model = Perceptron()
    optimizer = FNGD(model, **({"lr": lr, "damping": damping, "update": "adam", "weight_decay": 0.01} | ARMS[arm]))
    per_epoch = len(inputs) // options.batch_size
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * per_epoch)
    curve: list[float] = []
    for _ in range(options.epochs):
        order = torch.randperm(len(inputs))
        for batch in order[: per_epoch * options.batch_size].split(options.batch_size):
            extra = {INDEX_COLUMN: batch} if ARMS[arm]["sharing"] == "index" else {}
            loss = nn.functional.cross_entropy(model(pixel_values=inputs[batch], **extra), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        optimizer.end_epoch()
        curve.append(accuracy(model, data["test"], data["test_labels"]))
    return {
        "final": curve[-1],
        "best": max(curve),
        "fitted": accuracy(model, inputs, labels),
    }


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Share of right answers, in percent."""
    model.eval()
    right = (model(inputs).argmax(dim=1) == labels).float().mean()
    model.train()
    return 100 * float(right)


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table: mean over seeds, and the range of the final accuracy."""
    lines = [
        "| coefficients | lr | damping | seeds | final | range | best epoch | fitted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    keys = sorted({(list(ARMS).index(r["arm"]), -r["lr"], r["damping"]) for r in results})
    for place, negative_lr, damping in keys:
        arm, lr = list(ARMS)[place], -negative_lr
        rows = [r for r in results if (r["arm"], r["lr"], r["damping"]) == (arm, lr, damping)]
        mean = {k: statistics.mean(r[k] for r in rows) for k in ("final", "best", "fitted")}
        final = [r["final"] for r in rows]
        shown = "-" if ARMS[arm]["sharing"] == "uniform" else f"{damping:g}"
        lines.append(
            f"| {arm} | {lr:g} | {shown} | {len(rows)} | {mean['final']:.1f} | {min(final):.1f}-{max(final):.1f} | "
            f"{mean['best']:.1f} | {mean['fitted']:.0f} % |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse, run what is missing, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10", help="Hub id or local folder of CIFAR-10")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/label_noise"))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[1e-3, 3e-4])
    parser.add_argument("--damping", nargs="+", type=float, default=[0.001])
    parser.add_argument("--noise", type=float, default=0.4, help="share of labels replaced")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--max_train_samples", type=int, default=10_000)
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    log = options.output_dir / "results.jsonl"
    results = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    train_images, labels = load_images(options.dataset_name, "train", options.max_train_samples)
    test_images, test_labels = load_images(options.dataset_name, "test", None)
    data = {"train": train_images, "labels": labels, "test": test_images, "test_labels": test_labels}
    runs = [
        {"arm": arm, "lr": lr, "damping": damping, "seed": seed, **{key: getattr(options, key) for key in SETTINGS}}
        for seed in range(options.seeds)
        for lr in options.learning_rates
        for arm in options.arms
        for damping in (options.damping if ARMS[arm]["sharing"] != "uniform" else options.damping[:1])
    ]
    results = [result for result in results if all(result[key] == runs[0][key] for key in SETTINGS)]
    done = [{key: result[key] for key in runs[0]} for result in results]
    for run in tqdm([run for run in runs if run not in done], desc="runs"):
        figures = train(run["arm"], run["lr"], run["damping"], run["seed"], data, options)
        results.append(run | figures)
        with log.open("a") as file:
            file.write(json.dumps(results[-1]) + "\n")
        tqdm.write(f"{run['arm']}, lr {run['lr']:g}, seed {run['seed']}: {figures}")
        (options.output_dir / "table.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
