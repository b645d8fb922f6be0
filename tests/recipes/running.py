"""What tests of whole runs share."""

import json

import pytest
import torch
from safetensors.torch import load_file

from baselines.factory import baseline_layers
from common.timer import StepTimer
from hf_fngd import FNGD
from tests.recipes.translate_pairs import write_splits


def read(folder, name):
    """Return what a JSON file holds."""
    return json.loads((folder / name).read_text(encoding="utf-8"))


def short(folder, *options):
    """Return the command line of a run on the sentence pairs, in batches of 16."""
    common = ["--per_device_train_batch_size=16", "--learning_rate=0.01", "--disable_tqdm=true"]
    return [f"--dataset_name={write_splits(folder / 'pairs')}", f"--output_dir={folder / 'out'}", *options, *common]


def have_equal_weights(*folders):
    """Return whether the models in two folders are the same, bit for bit."""
    one, other = (load_file(file) for folder in folders for file in folder.glob("*model.safetensors"))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def interrupted(main, argv, folder):
    """Return the reports of a run and of one that was interrupted in its sixth step; both end with the same weights."""
    whole = main([*argv, f"--output_dir={folder / 'whole'}"])
    on_step_end = StepTimer.on_step_end

    def stop(self, args, state, control, **kwargs):
        on_step_end(self)
        if state.global_step == 6:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepTimer, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            main(argv)
    resumed = main(argv)
    assert "train_loss" not in resumed  # it would be of the rest alone
    assert have_equal_weights(folder / "whole", folder / "out")
    return whole, resumed


def in_parts(main, argv, folder, size, parts):
    """Return the reports of a run and of the same one in micro-batches."""
    accumulated = [f"--per_device_train_batch_size={size}", f"--gradient_accumulation_steps={parts}"]
    return [main([*argv, *more, f"--output_dir={folder / name}"]) for name, more in [("w", []), ("p", accumulated)]]


def assert_best_is_scored(main, argv, out, rel):
    """Beside the last, in a run with the same rows for validation and test; the epoch of the largest loss is "best"."""
    report = main([*argv, "--metric_for_best_model=loss", "--greater_is_better=true", "--save_total_limit=2"])
    history = read(out, "trainer_state.json")["log_history"]
    losses = {event["step"]: event["eval_loss"] for event in history if "eval_loss" in event}
    best, last = max(losses, key=losses.get), max(losses)
    assert losses[last] < losses[best]
    assert report["best_predict_loss"] == pytest.approx(losses[best], rel=rel)
    assert report["predict_loss"] == pytest.approx(losses[last], rel=rel)
    assert have_equal_weights(out, out / f"checkpoint-{last}")


def assert_matrices(model, names, head=None, **batch):
    """FNGD and the baselines both take these layers of a model, and no other, for matrices; the head FNGD does not."""
    assert set(baseline_layers(model)) == names | ({head} - {None})
    optimizer = FNGD(model)
    model(**batch).loss.backward()
    optimizer.step()
    assert {name.rsplit(".", 1)[0] for name in optimizer.coverage().preconditioned} == names
