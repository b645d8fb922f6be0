"""Every script in examples/ runs as a reader would run it, and prints what it is there to show."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_fngd import FNGDConfig

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def table(output: str, title: str) -> list[list[str]]:
    """The cells of the rows below the line that begins with the title, up to an empty line.

    Two spaces part the cells, for a name in the first column may have one in it.
    """
    lines = output.splitlines()
    begin = next(number for number, line in enumerate(lines) if line.lstrip().startswith(title)) + 1
    end = next((number for number in range(begin, len(lines)) if not lines[number].strip()), len(lines))
    return [re.split(r"\s{2,}", line.strip()) for line in lines[begin:end]]


def numbers(output: str, title: str) -> list[list[float]]:
    """A table of numbers alone."""
    return [[float(cell) for cell in " ".join(row).split()] for row in table(output, title)]


def trainer_in_five_lines(output: str) -> None:
    losses = [float(loss) for loss in re.findall(r"'loss': '([\d.]+)'", output)]
    assert len(losses) == 6
    assert losses[-1] < losses[0] / 2


def plain_pytorch_loop(output: str) -> None:
    rows = numbers(output, "epoch ")
    assert rows[-1][1] < rows[0][1] / 2
    assert all(spread > 0 for *_, spread in rows)
    assert "LayerNorm" not in output or "plain gradient" in output
    assert "0.weight" not in output.split("plain gradient")[-1]  # the first Linear is weighed


def gpt2_conv1d(output: str) -> None:
    rows = numbers(output, "step ")
    assert rows[-1][2] < rows[0][2] / 2
    assert all(spread > 0 and skipped == 0 for *_, spread, skipped in rows)
    assert "transformer.wte.weight, lm_head.weight" in output  # they are tied


def paper_weights(output: str) -> None:
    rows = table(output, "optimizer ")
    assert [row[0] for row in rows] == [
        "FNGD, default", "FNGD, paper's weights, Adam's update", "FNGD, preset paper", "AdamW"
    ]  # fmt: skip
    for _, first, last, test, _ in rows:
        assert float(last) < float(first)
        assert float(test) > 0.4  # guessing: 0.25
    default, weights, preset, adamw = (row[4] for row in rows)
    assert weights == preset == "0" + "1" * 11  # logged every half epoch; the last step of the first ends the phase
    assert "0" not in default
    assert adamw == "-"


def any_optimizer(output: str) -> None:
    rows = table(output, "optimizer ")
    assert [row[:2] for row in rows] == [
        [name, damping] for name in ("AdamW", "NAdam", "SGD with momentum") for damping in ("None", "0.1")
    ]
    for _, _, first, last in rows:
        assert float(last) < float(first) / 2
    for plain, preconditioned in zip(rows[::2], rows[1::2], strict=True):
        assert plain[2:] != preconditioned[2:]


def share_a_config(output: str) -> None:
    written = re.search(r"^\{.*?^\}", output, flags=re.DOTALL | re.MULTILINE)
    assert written is not None
    config = FNGDConfig.from_dict(json.loads(written.group()))
    assert config == FNGDConfig.preset("default", lr=1e-2, weight_decay=0.01, exclude_modules=["classifier"])
    assert "equal the saved ones: True" in output
    assert "among exclude_modules (classifier.weight, classifier.bias)" in output


def outsized_samples(output: str) -> None:
    errors = {tuple(row[:2]): (float(row[2]), float(row[3])) for row in table(output, "optimizer ")}
    assert set(errors) == {(name, clip) for name in ("AdamW", "FNGD") for clip in ("False", "True")}
    in_one_unit, mixed = errors.pop(("AdamW", "False"))
    assert mixed > 1.5 * in_one_unit
    assert all(error < 0.8 * mixed for _, error in errors.values())
    assert errors["FNGD", "False"][1] < errors["AdamW", "True"][1]


CHECKS = (trainer_in_five_lines, plain_pytorch_loop, gpt2_conv1d, paper_weights)
CHECKS += (any_optimizer, share_a_config, outsized_samples)
SCRIPTS = {f"{number:02}_{check.__name__}.py": check for number, check in enumerate(CHECKS, start=1)}


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example_runs_and_shows_what_it_is_for(script: str, tmp_path: Path) -> None:
    # A process of its own: scripts set seeds and leave hooks behind. Its warnings are errors as well.
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    SCRIPTS[script](done.stdout)


def test_readme_lists_every_example_and_no_other() -> None:
    linked = re.findall(r"\]\(([^)]+\.py)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"))
    assert linked == sorted(path.name for path in EXAMPLES.glob("*.py"))
