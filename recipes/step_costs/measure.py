"""What a step takes: its time beside other arms', its memory, its operations; and what the cost model expects."""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import profiler
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from baselines.composite import Composite
from common.timer import hardware
from comparison.runner import code_version
from hf_fngd.updates.orthogonal import count_operations, working_dtype
from step_costs import cost_model
from step_costs.arms import ADAMW, ARMS, SGD
from step_costs.models import COUNTED, attentions, batch, build

Run = Callable[[], None]
Record = dict[str, Any]
# Matrix products and solves, of which a shared step must not add any to SGD's. What it does add: a matrix-vector
# product a bias, in place of a sum.
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linalg_cholesky_ex", "aten::cholesky_solve")
WATCHED = (*PRODUCTS, "aten::mv")


def measure(options: argparse.Namespace, arms: Iterable[str]) -> list[Record]:
    """Let copies of one model take one step each in turn; return what is known of each arm."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = options.precision == "tf32"
    first, inputs = build(options).to(options.device), batch(options)
    expected = partial(prediction, first, options)
    runs: dict[str, Run] = {}
    records: dict[str, Record] = {}
    for name in arms:
        model = copy.deepcopy(first).train()
        optimizer = ARMS[name](model)
        called = torch.compile(model) if options.compile else model
        runs[name] = partial(full_step, called, optimizer.step, inputs, options.precision == "bf16")
        runs[name]()
        runs[name]()  # the first step may be another than all later ones
        of_all, of_matrices = state_bytes(model, optimizer)
        records[name] = {"arm": name, "parameters": count(first.parameters()), **machine(), "code": code_version()}
        records[name] |= {"predicted": expected(optimizer), "state_bytes": of_all, "matrix_state_bytes": of_matrices}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(options.rounds), desc="rounds"):
        for name, run in runs.items():
            synchronize(options.device)
            start = time.perf_counter()
            run()
            synchronize(options.device)
            times[name].append(1000 * (time.perf_counter() - start))
    for name, run in runs.items():
        median = statistics.median(times[name])
        records[name] |= {
            "milliseconds": times[name],
            "ratio_of_medians": median / statistics.median(times[SGD]),
            "ratio_of_means": statistics.mean(times[name]) / statistics.mean(times[SGD]),
            "ratio_to_adamw": median / statistics.median(times[ADAMW]),
            "peak_mib": peak(run, options.device),
            "operations": operations(run),
        }
    return list(records.values())


def machine() -> dict[str, str]:
    """What a time depends on beside the code and the setting, which has the number of threads."""
    return {"hardware": hardware().partition(",")[0], "torch": torch.__version__}


def full_step(model: nn.Module, step: Callable[[], Any], inputs: dict[str, Tensor], half: bool = False) -> None:
    """Forward, backward, update."""
    with torch.autocast(inputs["labels"].device.type, torch.bfloat16, enabled=half):
        loss = model(**inputs).loss
    loss.backward()
    step()
    model.zero_grad()


def layers_of(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """The layers that multiply by a matrix, and whether it is tied to a table."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    types = nn.Linear | Conv1D | nn.Conv2d
    return [(m, id(m.weight) in tables) for m in model.modules() if isinstance(m, types)]


def state_bytes(model: nn.Module, optimizer: Optimizer) -> tuple[float, float]:
    """The bytes of state tensors a trained parameter: of all, and of the matrices of layers that are not tied.

    The preconditioner's own state counts among all.
    """
    states = {parameter: bytes_of(state) for part in parts_of(optimizer) for parameter, state in part.state.items()}
    engine = getattr(optimizer, "preconditioner", None)
    of_all = sum(states.values()) + (bytes_of(engine.state_dict()) if engine is not None else 0)
    matrices = [layer.weight for layer, tied in layers_of(model) if not tied]
    return of_all / count(model.parameters()), sum(states.get(p, 0) for p in matrices) / count(matrices)


def count(parameters: Iterable[Tensor]) -> int:
    """The numbers that are trained; marian's positions are not."""
    return sum(p.numel() for p in parameters if p.requires_grad)


def parts_of(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that it consists of."""
    return optimizer.optimizers if isinstance(optimizer, Composite) else [optimizer]


def bytes_of(state: Any) -> int:
    """Those of the tensors in it."""
    return sum(x.nbytes for x in tree_leaves(state) if isinstance(x, Tensor))


def prediction(model: nn.Module, options: argparse.Namespace, optimizer: Optimizer) -> float | None:
    """A step over SGD's by the cost model; None for an optimizer, or a model, whose operations it does not count."""
    if options.model not in COUNTED or options.lora_r is not None:
        return None
    n, t = options.batch_size, options.length
    layers = layers_of(model)
    shapes = [(layer.weight.shape[0], layer.weight.shape[1]) for layer, _ in layers]
    untied = [shape for shape, (_, tied) in zip(shapes, layers, strict=True) if not tied]
    added = update_operations(optimizer, n * t)
    if added is None:
        return None
    if engine := getattr(optimizer, "preconditioner", None):
        added += {
            "clipped": partial(cost_model.clipping, shapes),
            "never": partial(cost_model.coefficient_step, untied),
            "replay": partial(cost_model.weighting, untied),  # in a shared step
            "uniform": partial(cost_model.weighting, []),
        }[engine.policy.name](n, t)
    return 1 + added / cost_model.forward_and_backward(shapes, n, t, attentions(options), options.d_model)


def update_operations(optimizer: Optimizer, positions: int) -> float | None:
    """The products of the update rules at so many positions a step; None where one of them is not known."""
    total = 0.0
    for part in parts_of(optimizer):
        for group in part.param_groups:
            rule, steps = group.get("rule", type(part).__name__), group.get("ns_steps", 5)
            for p in group["params"] if rule not in ("SGD", "AdamW", "adam", "momentum") else []:
                dtype = working_dtype(p.dtype, p.device)
                if rule == "block_muon":
                    size = group["block_size"]
                    total += cost_model.block_orthogonalization(*p.shape, size, positions, dtype, steps)
                elif rule in ("muon", "Muon"):  # torch's computes in bfloat16, without Gram matrices
                    of_torch = type(part).__module__.startswith("torch.")
                    total += count_operations(*p.shape, steps, torch.bfloat16 if of_torch else dtype)
                else:
                    return None
    return total


def peak(run: Run, device: str) -> float:
    """The most memory that a step needs beside what stays between steps, in MiB."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profiler.profile(profile_memory=True) as trace:
        run()
    events = [event for event in trace.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):  # bytes that came, or went
        now += event.nbytes()
        most = max(most, now)
    return most / 2**20


def operations(run: Run) -> Counter[str]:
    """How often each watched operation runs in one step."""
    with profiler.profile() as trace:
        run()
    return Counter({event.key: event.count for event in trace.key_averages() if event.key in WATCHED})


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
