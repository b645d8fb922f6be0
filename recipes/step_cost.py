"""What a step costs: medians of interleaved steps, and the operations that each kind of step is made of.

    python recipes/step_cost.py
    python recipes/step_cost.py --d_model 512 --ffn_dim 2048 --layers 6 --heads 8

All arms train copies of one Transformer on one batch, one step each in turn, so that a change of the machine's
speed meets all of them; what counts is the ratio to SGD with momentum: of the medians for steps of one kind, of the
means for optimizers that do more in one step of 10 or 100 (whose period `--rounds` has to hold).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from transformers import MarianConfig, MarianMTModel

from baselines import BaselineFactory
from hf_fngd import FNGD, FNGDPreconditioner

Step = Callable[[], None]
MATRICES = ["linear", "conv1d"]  # layer types
# Matrix products and solves, of which a shared step must not add any to SGD's. What it does add: a matrix-vector
# product a bias, in place of a sum.
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linalg_cholesky_ex", "aten::cholesky_solve")
WATCHED = (*PRODUCTS, "aten::mv")


def build_model(options: argparse.Namespace) -> MarianMTModel:
    """The Transformer of Vaswani et al. (2017), at the size asked for."""
    return MarianMTModel(
        MarianConfig(
            vocab_size=options.vocab_size,
            d_model=options.d_model,
            encoder_layers=options.layers,
            decoder_layers=options.layers,
            encoder_ffn_dim=options.ffn_dim,
            decoder_ffn_dim=options.ffn_dim,
            encoder_attention_heads=options.heads,
            decoder_attention_heads=options.heads,
            activation_function="relu",
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    ).to(options.device)


def sgd(model: nn.Module) -> Step:
    """SGD with momentum, the yardstick."""
    return torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, foreach=True).step


def adamw(model: nn.Module) -> Step:
    """AdamW, as Trainer builds it."""
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True).step


def engine(model: nn.Module, **arguments: Any) -> Step:
    """The preconditioner in front of the yardstick."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, foreach=True)
    FNGDPreconditioner(model, **arguments).follow(optimizer)
    return optimizer.step


def fngd(model: nn.Module, **arguments: Any) -> Step:
    """The whole optimizer."""
    return FNGD(model, lr=1e-5, **arguments).step


def baseline(model: nn.Module, name: str) -> Step:
    """A baseline of `recipes/translate.py`, with its default periods."""
    return BaselineFactory()(model, name=name, lr=1e-5).step


ARMS: dict[str, Callable[[nn.Module], Step]] = {
    "SGD-m": sgd,
    "AdamW": adamw,
    "engine + SGD-m, clipped": partial(engine),
    "engine + SGD-m, replay, shared step": partial(engine, sharing="replay", coefficient_steps=1),
    "engine + SGD-m, never (a coefficient step)": partial(engine, sharing="never"),
    "FNGD muon, clipped (the default)": partial(fngd),
    "FNGD muon, clipped in linear layers alone": partial(fngd, layer_types=MATRICES),
    "FNGD muon, w = 1": partial(fngd, sharing="uniform"),
    "FNGD adam, clipped": partial(fngd, update="adam"),
    "FNGD adam, w = 1": partial(fngd, update="adam", sharing="uniform"),
    "FNGD adam, never (NGD)": partial(fngd, update="adam", sharing="never"),
    "FNGD momentum, replay, shared step": partial(fngd, update="momentum", sharing="replay", coefficient_steps=1),
    "Muon": partial(baseline, name="muon"),
    "Eva": partial(baseline, name="eva"),
    "KFAC, 10/100": partial(baseline, name="kfac"),
    "Shampoo, 10/100": partial(baseline, name="shampoo"),
    "SOAP": partial(baseline, name="soap"),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d_model", type=int, default=128)
    parser.add_argument("--ffn_dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2, help="encoder layers, and decoder layers")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=8000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--length", type=int, default=16, help="tokens of source and target")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="beside SGD-m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    first = build_model(options)
    shape = (options.batch_size, options.length)
    batch = {
        name: torch.randint(2, options.vocab_size, shape, device=options.device) for name in ("input_ids", "labels")
    }
    runs: dict[str, Step] = {}
    for name in dict.fromkeys(["SGD-m", *options.arms]):
        arm = ARMS[name]
        model = copy.deepcopy(first).train()
        runs[name] = partial(full_step, model, arm(model), batch)
    for run in runs.values():  # the first step of replay is its coefficient step
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(options.rounds), desc="rounds"):
        for name, run in runs.items():
            synchronize(options.device)
            start = time.perf_counter()
            run()
            synchronize(options.device)
            times[name].append(time.perf_counter() - start)
    yardstick, mean = statistics.median(times["SGD-m"]), statistics.mean(times["SGD-m"])
    print(
        f"| step | ratio of medians | ratio of means | {' | '.join(name.removeprefix('aten::') for name in WATCHED)} |"
    )
    print("|---" * (len(WATCHED) + 3) + "|")
    for name, run in runs.items():
        counts = operations(run)
        ratios = f"{statistics.median(times[name]) / yardstick:.2f} | {statistics.mean(times[name]) / mean:.2f}"
        print(f"| {name} | {ratios} | {' | '.join(str(counts[operation]) for operation in WATCHED)} |")
    print(f"\nSGD-m: {1000 * yardstick:.1f} ms a step, median of {options.rounds}.")


def full_step(model: nn.Module, step: Step, batch: dict[str, Tensor]) -> None:
    """Forward, backward, update."""
    model(**batch).loss.backward()
    step()
    model.zero_grad()


def operations(run: Step) -> Counter[str]:
    """How often each watched operation runs in one step."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        run()
    return Counter({event.key: event.count for event in trace.key_averages() if event.key in WATCHED})


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
