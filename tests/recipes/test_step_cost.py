"""What a shared step is made of: SGD's own matrix products, and nothing per sample."""

import argparse
import sys
from functools import partial

import pytest
import torch

import step_cost
from tests.steps import Allocations

SHARED = "engine + SGD-m, replay, shared step"


def options() -> argparse.Namespace:
    return argparse.Namespace(
        d_model=16, ffn_dim=32, layers=1, heads=2, vocab_size=40, batch_size=6, length=5, device="cpu"
    )


def run_of(arm: str) -> step_cost.Step:
    torch.manual_seed(0)
    model = step_cost.marian(options()).train()
    batch = {name: torch.randint(2, 40, (6, 5)) for name in ("input_ids", "labels")}
    run = partial(step_cost.full_step, model, step_cost.ARMS[arm](model), batch)
    run()
    run()
    return run


def test_shared_step_has_the_products_of_sgd_and_no_solve() -> None:
    plain = step_cost.operations(run_of("SGD-m"))
    assert plain["aten::mm"] > 0
    counts = step_cost.operations(run_of(SHARED))
    assert {name: counts[name] for name in step_cost.PRODUCTS} == {name: plain[name] for name in step_cost.PRODUCTS}


def test_coefficient_step_solves_once_a_layer() -> None:
    counts = step_cost.operations(run_of("engine + SGD-m, never (a coefficient step)"))
    model = step_cost.marian(options())
    layers = sum(isinstance(module, torch.nn.Linear) for module in model.modules()) - 1  # the head is tied
    assert counts["aten::linalg_cholesky_ex"] == counts["aten::cholesky_solve"] == layers


def test_shared_step_forms_no_tensor_larger_than_sgds() -> None:
    sizes = []
    for arm in ("SGD-m", SHARED):
        run = run_of(arm)
        with Allocations() as allocations:
            run()
        sizes.append(allocations.largest)
    assert sizes[0] >= sizes[1]


def test_the_script_prints_a_row_an_arm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--d_model 16 --ffn_dim 32 --layers 1 --heads 2 --vocab_size 40 --batch_size 4 --length 5 --rounds 2"
    monkeypatch.setattr(sys, "argv", ["step_cost.py", *sizes.split(), "--device", "cpu"])
    threads = torch.get_num_threads()
    step_cost.main()
    torch.set_num_threads(threads)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(step_cost.ARMS)
    assert rows[1].startswith("| SGD-m | 1.00 | 1.00 |")
