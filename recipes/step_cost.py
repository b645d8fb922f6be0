"""What a step costs: medians of interleaved steps, and the operations that each kind of step is made of.

    python recipes/step_cost.py
    python recipes/step_cost.py --d_model 512 --ffn_dim 2048 --layers 6 --heads 8
    python recipes/step_cost.py --model gpt2 --d_model 768 --ffn_dim 3072 --layers 12 --heads 12 --batch_size 8 \
        --length 1024 --vocab_size 50257 --precision bf16

All arms train copies of one Transformer on one batch, one step each in turn, so that a change of the machine's
speed meets all of them; what counts is the ratio to SGD with momentum: of the medians for steps of one kind, of the
means for optimizers that do more in one step of 10 or 100 (whose period `--rounds` has to hold).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
)

from baselines import BaselineFactory
from hf_fngd import FNGD, FNGDPreconditioner

Step = Callable[[], None]
MATRICES = ["linear", "conv1d"]  # layer types
# Matrix products and solves, of which a shared step must not add any to SGD's. What it does add: a matrix-vector
# product a bias, in place of a sum.
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linalg_cholesky_ex", "aten::cholesky_solve")
WATCHED = (*PRODUCTS, "aten::mv")


def marian(options: argparse.Namespace) -> MarianMTModel:
    """The Transformer of Vaswani et al. (2017)."""
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
            max_position_embeddings=max(1024, options.length),
            activation_function="relu",
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )


def gpt2(options: argparse.Namespace) -> GPT2LMHeadModel:
    """GPT-2 (Radford et al. 2019), whose layers are Conv1D."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=options.vocab_size,
            n_embd=options.d_model,
            n_layer=options.layers,
            n_head=options.heads,
            n_inner=options.ffn_dim,
            n_positions=max(1024, options.length),
            bos_token_id=1,
            eos_token_id=1,
        )
    )


def bert(options: argparse.Namespace) -> BertForMaskedLM:
    """BERT (Devlin et al. 2019)."""
    return BertForMaskedLM(BertConfig(**common(options)))


def llama(options: argparse.Namespace) -> LlamaForCausalLM:
    """Llama (Touvron et al. 2023): RMS norms, gated feed-forward layers, an untied head."""
    return LlamaForCausalLM(LlamaConfig(**common(options), pad_token_id=0))


def common(options: argparse.Namespace) -> dict[str, int]:
    """What most configurations call their sizes."""
    return {
        "vocab_size": options.vocab_size,
        "hidden_size": options.d_model,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "intermediate_size": options.ffn_dim,
        "max_position_embeddings": max(512, options.length),
    }


MODELS: dict[str, Callable[[argparse.Namespace], PreTrainedModel]] = {
    "marian": marian,
    "gpt2": gpt2,
    "bert": bert,
    "llama": llama,
}


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
    "FNGD block_muon, clipped": partial(fngd, update="block_muon"),
    "FNGD block_muon, w = 1": partial(fngd, update="block_muon", sharing="uniform"),
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
    parser.add_argument("--model", choices=MODELS, default="marian")
    parser.add_argument("--d_model", type=int, default=128)
    parser.add_argument("--ffn_dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2, help="marian: of the encoder, and of the decoder")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=8000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--length", type=int, default=16, help="tokens; marian: of source and target")
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32", help="bf16: by autocast")
    parser.add_argument("--compile", action="store_true", help="run the models through torch.compile")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="beside SGD-m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="append the results to this file, one line of JSON an arm")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = options.precision == "tf32"

    first = MODELS[options.model](options).to(options.device)
    shape = (options.batch_size, options.length)
    batch = {
        name: torch.randint(2, options.vocab_size, shape, device=options.device) for name in ("input_ids", "labels")
    }
    runs: dict[str, Step] = {}
    sizes: dict[str, tuple[float, float]] = {}
    for name in dict.fromkeys(["SGD-m", *options.arms]):
        model = copy.deepcopy(first).train()
        before, step = allocated(options.device), ARMS[name](model)
        called = torch.compile(model) if options.compile else model
        runs[name] = partial(full_step, called, step, batch, options.precision == "bf16")
        sizes[name] = (before, run_twice(runs[name], options.device))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(options.rounds), desc="rounds"):
        for name, run in runs.items():
            synchronize(options.device)
            start = time.perf_counter()
            run()
            synchronize(options.device)
            times[name].append(time.perf_counter() - start)
    yardstick, mean = statistics.median(times["SGD-m"]), statistics.mean(times["SGD-m"])
    parameters = sum(p.numel() for p in first.parameters())
    columns = ["ratio of medians", "ratio of means", "quartiles", "state, bytes a parameter", "peak of a step, MiB"]
    print(f"| step | {' | '.join(columns)} | {' | '.join(name.removeprefix('aten::') for name in WATCHED)} |")
    print("|---" * (len(WATCHED) + 6) + "|")
    for name, run in runs.items():
        before, kept = sizes[name]
        row = {
            "ratio_of_medians": statistics.median(times[name]) / yardstick,
            "ratio_of_means": statistics.mean(times[name]) / mean,
            "state_bytes": (kept - before) / parameters,
            "peak_mib": peak(run, options.device),
        }
        counts = operations(run)
        low, _, high = (time / yardstick for time in statistics.quantiles(times[name], n=4))
        measured = f"{row['ratio_of_medians']:.2f} | {row['ratio_of_means']:.2f} | {low:.2f} to {high:.2f}"
        memory = f"{row['state_bytes']:.1f} | {row['peak_mib']:.0f}" if kept else "- | -"
        print(f"| {name} | {measured} | {memory} | {' | '.join(str(counts[operation]) for operation in WATCHED)} |")
        if options.output:
            settings = {key: value for key, value in vars(options).items() if key not in ("output", "arms")}
            line = settings | {"arm": name, "parameters": parameters, "milliseconds": [1000 * t for t in times[name]]}
            with options.output.open("a") as file:
                file.write(json.dumps(line | row) + "\n")
    print(f"\nSGD-m: {1000 * yardstick:.1f} ms a step, median of {options.rounds}; {parameters / 1e6:.1f}M parameters.")


def full_step(model: nn.Module, step: Step, batch: dict[str, Tensor], half: bool = False) -> None:
    """Forward, backward, update."""
    with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=half):
        loss = model(**batch).loss
    loss.backward()
    step()
    model.zero_grad()


def run_twice(run: Step, device: str) -> float:
    """Take two steps, the first of which may be another than all later ones; return the bytes allocated then."""
    run()
    run()
    return allocated(device)


def allocated(device: str) -> float:
    """The bytes of the device's tensors; 0 on a CPU, which counts none."""
    return torch.cuda.memory_allocated() if device.startswith("cuda") else 0


def peak(run: Step, device: str) -> float:
    """The most memory that a step needs beside what stays between steps, in MiB."""
    if not device.startswith("cuda"):
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


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
