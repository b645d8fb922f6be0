"""Steps and their cost: what a shared step is made of, what the cost model expects, memory, a suite."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import step_cost
from hf_fngd.updates.orthogonal import count_operations
from hf_fngd.weights.gram import cheaper_route, gram
from step_costs import arms, cost_model, measure, models, report
from tests.steps import Allocations

SHARED = "engine + SGD-m, replay, shared step"
TOY = "--d_model 16 --ffn_dim 32 --layers 1 --heads 2 --vocab_size 40 --batch_size 6 --length 5 --device cpu --rounds 1"


def run_of(arm: str, words: str = TOY) -> tuple[measure.Run, float | None]:
    """A full step, and what the cost model expects of it, over SGD's."""
    torch.manual_seed(0)
    options = step_cost.make_parser().parse_args(words.split())
    model = models.MODELS[options.model](options).train()
    model.set_attn_implementation("eager")  # whose products are counted
    optimizer = arms.ARMS[arm](model)
    run = partial(measure.full_step, model, optimizer.step, models.batch(options))
    run()
    run()
    return run, measure.prediction(model, options, optimizer)


def test_shared_step_has_the_products_of_sgd_and_no_solve() -> None:
    plain = measure.operations(run_of("SGD-m")[0])
    assert plain["aten::mm"] > 0
    counts = measure.operations(run_of(SHARED)[0])
    assert {name: counts[name] for name in measure.PRODUCTS} == {name: plain[name] for name in measure.PRODUCTS}


def test_coefficient_step_solves_once_a_layer() -> None:
    counts = measure.operations(run_of("engine + SGD-m, never (a coefficient step)")[0])
    model = models.marian(step_cost.make_parser().parse_args(TOY.split()))
    layers = sum(isinstance(module, torch.nn.Linear) for module in model.modules()) - 1  # the head is tied
    assert counts["aten::linalg_cholesky_ex"] == counts["aten::cholesky_solve"] == layers


def test_shared_step_forms_no_tensor_larger_than_sgds() -> None:
    sizes = []
    for arm in ("SGD-m", SHARED):
        run, _ = run_of(arm)
        with Allocations() as allocations:
            run()
        sizes.append(allocations.largest)
    assert sizes[0] >= sizes[1]


# The cost model -----------------------------------------------------------------------------------------------


def addmm_flop(added: torch.Size, a: torch.Size, b: torch.Size, **_: object) -> int:
    return 2 * a[0] * a[1] * b[1]


def flops(run: measure.Run) -> int:
    # Of the products in the package only this one is unknown to it.
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flop}) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("model", sorted(models.COUNTED))
def test_the_cost_model_counts_what_torch_counts(model: str) -> None:
    words = f"{TOY} --model {model} --d_model 128 --ffn_dim 320 --heads 4 --batch_size 8 --length 24"
    plain = flops(run_of("SGD-m", words)[0])
    names = [
        "AdamW, fused",
        "engine + SGD-m, clipped",
        "engine + SGD-m, never (a coefficient step)",
        SHARED,
        "FNGD muon, clipped",
        "FNGD block_muon, w = 1",
        "FNGD adam, never (NGD)",
        arms.TORCH_MUON,
        "Muon",
    ]
    found, expected = {}, {}
    for name in names:
        run, expected[name] = run_of(name, words)
        found[name] = flops(run) / plain
    assert found == pytest.approx(expected, rel=0.01)
    assert found["Muon"] > 1.5  # of which 1 % is little


@pytest.mark.parametrize(("n", "t", "route"), [(8, 1, "ghost"), (8, 5, "ghost"), (8, 24, "formed"), (64, 16, "formed")])
def test_gram_matrices_are_counted_by_their_route(n: int, t: int, route: str) -> None:
    assert cheaper_route(n, t, 96, 128) == route
    a, g = torch.randn(n, t, 96), torch.randn(n, t, 128)
    found = flops(partial(gram, a, g, bias=False, memory_budget=2**28))
    assert cost_model.gram_matrix(128, 96, n, t) == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize(("columns", "on_gram_matrix"), [(64, False), (127, False), (128, True), (512, True)])
def test_muon_has_the_form_that_the_package_chooses(columns: int, on_gram_matrix: bool) -> None:
    on_matrix, on_gram = 5 * (4 * 64**2 * columns + 2 * 64**3), 4 * 64**2 * columns + 34 * 64**3
    for shape in ((64, columns), (columns, 64)):
        assert count_operations(*shape, 5, torch.float32) == (on_gram if on_gram_matrix else on_matrix)
        assert count_operations(*shape, 5, torch.bfloat16) == on_matrix


def test_what_is_not_counted_has_no_prediction() -> None:
    assert run_of("KFAC, 10/100")[1] is None


# Memory -------------------------------------------------------------------------------------------------------


def test_the_peak_is_what_lives_at_once() -> None:
    def run() -> None:
        for _ in range(3):
            torch.empty(2**18)  # 1 MiB each, one after the other
        first = torch.empty(2**18)
        torch.cat([first, first])

    assert measure.peak(run, "cpu") == pytest.approx(3, abs=0.01)


@pytest.mark.parametrize(
    ("arm", "of_matrices"),
    [
        ("SGD-m", 4),
        ("AdamW, fused", 8),
        ("FNGD block_muon, clipped (the default)", 4),
        ("Muon", 4),
        (arms.TORCH_MUON, 4),
    ],
)
def test_state_is_counted_in_tensors(arm: str, of_matrices: int) -> None:
    options = step_cost.make_parser().parse_args([*TOY.split(), "--model", "gpt2", "--vocab_size", "400"])
    model = models.gpt2(options)
    optimizer = arms.ARMS[arm](model)
    measure.full_step(model, optimizer.step, models.batch(options))
    of_all, found = measure.state_bytes(model, optimizer)
    assert found == pytest.approx(of_matrices, abs=0.05)  # beside counters
    share = (
        sum(p.numel() for name, p in model.named_parameters() if ".h." in name and p.dim() == 2)
        / model.num_parameters()
    )
    of_rest = 4 if arm == "SGD-m" else 8
    assert of_all == pytest.approx(share * of_matrices + (1 - share) * of_rest, abs=0.05)


# The command --------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| ")]


def test_the_script_prints_a_row_an_arm(capsys: pytest.CaptureFixture[str]) -> None:
    step_cost.main([*TOY.split(), "--rounds", "2"])
    rows = rows_of(capsys.readouterr().out)
    assert len(rows) == 2 + len(arms.ARMS)
    assert rows[2].startswith("| SGD-m | 1.00 | 1.00 |")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(("model", "output"), [("bert_classifier", 16 * models.CLASSES + models.CLASSES), ("llama", 0)])
def test_of_adapters_alone_there_is_a_state(model: str, output: int, capsys: pytest.CaptureFixture[str]) -> None:
    arm = "FNGD block_muon, clipped (the default)"
    options = step_cost.make_parser().parse_args([*TOY.split(), "--model", model, "--lora_r", "2", "--arms", arm])
    sgd, _, fngd = measure.measure(options, arms.available([arm]))
    layers = [m for m in models.build(options).modules() if hasattr(m, "lora_A")]
    adapters = sum(2 * (layer.in_features + layer.out_features) for layer in layers)
    assert sgd["parameters"] == fngd["parameters"] == adapters + output
    assert sgd["state_bytes"] == pytest.approx(4)
    assert fngd["state_bytes"] == pytest.approx((4 * adapters + 8 * output) / (adapters + output), rel=0.05)
    assert fngd["predicted"] is None


@pytest.mark.parametrize("model", list(models.IMAGE_MODELS))
def test_images_have_no_prediction(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["engine + SGD-m, clipped", SHARED, "FNGD block_muon, clipped (the default)"]
    if model != "vgg11":  # whose largest factor takes minutes
        names.append("KFAC, by eigenvalues, 10/100")
    words = ["--model", model, "--device", "cpu", "--length", "8", "--batch_size", "4", "--rounds", "1"]
    step_cost.main([*words, "--arms", *names, arms.TORCH_MUON])
    text = capsys.readouterr().out
    assert f"{model}, batches of 4 images of 8 x 8 pixels, fp32, cpu" in text
    rows = rows_of(text)[2:]
    assert len(rows) == 2 + len(names)  # torch's Muon takes no filters
    assert all(row.split(" | ")[5] == "-" for row in rows)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("suite", ["cpu", "cuda"])
def test_a_suite_goes_on_where_it_was_stopped(suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, made = tmp_path / "all.jsonl", []
    images = ["resnet32", "vgg11"] if suite == "cuda" else []
    order = ["marian", *images, "gpt2", "bert", "bert_classifier", "bert_classifier", "llama"]  # its adapters too
    real = step_cost.measure

    def stopped(options: object, names: list[str]) -> list[measure.Record]:
        assert len(made) < len(order) + 2, "measured anew"
        made.append(options.model)
        if len(made) == 3:
            raise KeyboardInterrupt
        return real(options, names)

    monkeypatch.setattr(step_cost, "measure", stopped)
    words = [*TOY.split(), "--precision", "fp32", "--arms", "Muon", "--suite", suite, "--output", str(output)]
    words += ["--length", "32", "--plot", str(tmp_path / "all.png")]  # as many pixels as vgg11 wants
    with pytest.raises(KeyboardInterrupt):
        step_cost.main(words)
    lines = output.read_text().splitlines()
    output.write_text("\n".join(lines[:-1]) + '\n{"arm": "Muon", "cut off')  # as by a kill
    step_cost.main(words)
    assert made == [*order[:3], order[1], *order[2:]]  # equal ones once, what lost a line again
    page = (tmp_path / "all.md").read_text()
    assert len(rows_of(page)) == len(order) * (2 + 3)
    assert (tmp_path / "all.png").stat().st_size > 0
    assert all(page.count(f"{name}, d 16") == 1 + (name == "bert_classifier") for name in models.MODELS)
    assert page.count("LoRA of rank 8") == 1
    step_cost.main(words)
    assert len(made) == len(order) + 2
    monkeypatch.setattr(report, "machine", lambda: {"hardware": "another"})
    with pytest.raises(AssertionError, match="measured anew"):
        step_cost.main(words)
    records = [json.loads(line) for line in output.read_text().splitlines() if "cut off" not in line]
    assert all(record["milliseconds"] and record["operations"]["aten::mm"] for record in records)


def test_ratios_are_to_both_yardsticks() -> None:
    times = {"SGD-m": [2.0, 2.0], "AdamW, fused": [4.0, 4.0], "Muon": [1.0, 3.0]}
    records = [{"arm": name, "milliseconds": found} for name, found in times.items()]
    assert report.median(records) == 2.0
    assert report.quartiles(records[2], records) == (0.25, 1.75)


@pytest.mark.parametrize(
    ("words", "message"),
    [("--suite cpu", "needs --output"), ("--device cuda", "no CUDA device"), ("--rounds 0", "at least 1")],
)
def test_what_cannot_be_measured_is_refused(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit):
        step_cost.main(words.split())
    assert message in capsys.readouterr().err


def test_an_old_torch_has_all_arms_but_its_muon(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    assert arms.available(["Muon", arms.TORCH_MUON]) == ["SGD-m", "AdamW, fused", "Muon"]
    assert "has no torch.optim.Muon" in capsys.readouterr().err
