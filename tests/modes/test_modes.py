"""Every mode of Trainer against the dense float64 oracle, and what Trainer makes of the loss."""

from pathlib import Path

import pytest
import torch

from tests.modes import table
from tests.modes.harness import Record, train
from tests.modes.nets import KINDS, LINEAR, Kind
from tests.modes.oracle import compare
from tests.modes.registry import SHARINGS, Mode
from tests.modes.rows import MODES

HERE = [mode for mode in MODES.values() if mode.tested_in is None]


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("mode", HERE, ids=lambda mode: mode.name)
def test_gradients_are_the_oracles_or_the_mode_is_refused(mode: Mode, kind: Kind, sharing: str, tmp_path: Path) -> None:
    if mode.refused is None:
        assert mode.run(kind, sharing, tmp_path) < mode.tolerance
    else:
        with pytest.raises(RuntimeError, match=mode.refused):
            mode.run(kind, sharing, tmp_path)


WRONG = {
    "classifier.weight": "never",
    "bert.embeddings.word_embeddings.weight": "never",
    "bert.embeddings.position_embeddings.weight": "clipped",
    "bert.encoder.layer.0.output.LayerNorm.bias": "clipped",
}


@pytest.mark.parametrize(("name", "sharing"), WRONG.items())
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e3])
def test_a_wrong_gradient_is_an_error(name: str, sharing: str, value: float, tmp_path: Path) -> None:
    record = train(LINEAR, sharing, tmp_path, max_steps=2)
    assert compare(LINEAR, record).error < 1e-5
    record.steps[1].gradients[name].view(-1)[0] = value
    assert compare(LINEAR, record).error > 1


@pytest.mark.parametrize("sharing", SHARINGS)
def test_the_factor_that_trainer_leaves_in_the_loss_changes_no_weight(sharing: str, tmp_path: Path) -> None:
    """BERT ignores ``num_items_in_batch``, Trainer takes it for a model that does not: with accumulation 4 its gradient
    is 4 times too large, unless the model says so.
    """

    def run(accepts: bool | None) -> Record:
        model = LINEAR.make()
        if accepts is not None:
            model.accepts_loss_kwargs = accepts
        changes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4, "learning_rate": 0.0}
        return train(LINEAR, sharing, tmp_path, model=model, num_train_epochs=1, **changes)

    trapped, right = run(None), run(False)
    for step, expected in zip(trapped.steps, right.steps, strict=True):
        for name, gradient in expected.gradients.items():
            assert torch.equal(step.gradients[name], 4 * gradient), name
    engines = [record.optimizer.preconditioner for record in (trapped, right) if record.optimizer]
    kept = [
        [value for value in engine.state_dict()["policy"].values() if isinstance(value, torch.Tensor)]
        for engine in engines
    ]
    scale = 4 if sharing == "clipped" else 1  # it keeps norms, the others weights
    for found, wanted in zip(*kept, strict=True):
        torch.testing.assert_close(found, scale * wanted, rtol=0, atol=0, equal_nan=True)
        assert (found != 1).any()
    assert engines[0].diagnostics() == engines[1].diagnostics()


def test_the_table_has_a_word_for_every_outcome(tmp_path: Path) -> None:
    def equal(kind: Kind, sharing: str, folder: Path) -> float:
        return {"never": 1e-7, "replay": 3e-7, "clipped": 2e-7}[sharing]

    def unequal(kind: Kind, sharing: str, folder: Path) -> float:
        return 0.5 if kind is LINEAR else 1e-9

    def refused(kind: Kind, sharing: str, folder: Path) -> float:
        raise RuntimeError("FNGD does not do this: it would be wrong")

    def wrong(kind: Kind, sharing: str, folder: Path) -> float:
        assert sharing != "replay", "no shared step | at all"
        return 0.0

    modes = [Mode(run.__name__, run, 1e-5) for run in (equal, unequal, refused, wrong)]
    assert table.rows(modes) == [
        ["equal", "equal, error 3e-07 (tolerance 1e-05)", "equal, error 3e-07 (tolerance 1e-05)"],
        ["unequal", "NOT equal, error 0.5 (tolerance 1e-05)", "equal, error 1e-09 (tolerance 1e-05)"],
        ["refused", *["refused: FNGD does not do this: it would be wrong"] * 2],
        ["wrong", *["WRONG: no shared step / at all"] * 2],
    ]
    table.write(modes, tmp_path / "modes.md")
    lines = (tmp_path / "modes.md").read_text(encoding="utf-8").splitlines()
    cells = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    assert len(cells) == 2 + len(modes)
    assert all(cell.strip() for row in cells for cell in row)


def test_the_committed_table_is_of_these_modes() -> None:
    text = (Path(__file__).parents[2] / table.PATH).read_text(encoding="utf-8")
    written = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert sorted(row[0] for row in written[2:]) == sorted(MODES)  # whose order is that of imports
    for name, *cells in written[2:]:
        begin = "equal, error" if MODES[name].refused is None else "refused: "
        assert all(cell.startswith(begin) for cell in cells), name
