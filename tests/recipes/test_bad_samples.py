"""Spoiled training rows, and the remedies that the classification recipe has beside the optimizer."""

import pytest
import torch
from datasets import Dataset
from torch import nn

import text_classification
from classification.bad_samples import BadSampleArguments, spoiled
from classification.callbacks import SkipSpikes
from tests.recipes.running import have_equal_weights, read
from tests.recipes.test_fine_tuning import ROWS, argv, pretrained  # noqa: F401

LABELS = [n % 4 for n in range(len(ROWS))]


def spoil(kind, share=0.25, seed=0):
    rows = Dataset.from_dict({"text": [row["text"] for row in ROWS], "labels": LABELS})
    found = spoiled(rows, BadSampleArguments(share, kind), 4, seed)
    before, after = list(zip(rows["text"], LABELS, strict=True)), list(zip(found["text"], found["labels"], strict=True))
    return [(old, new) for old, new in zip(before, after, strict=True) if old != new], after


@pytest.mark.parametrize("kind", ["garbled", "truncated", "boilerplate", "language", "shifted"])
def test_so_many_rows_are_spoiled_and_the_same_for_a_seed(kind):
    changed, after = spoil(kind)
    assert len(changed) == 16
    assert spoil(kind)[1] == after != spoil(kind, seed=1)[1]
    for (text, label), (new, other) in changed:
        assert (label == other) == (kind != "shifted")
        if kind == "garbled":
            assert sorted(text) == sorted(new) != text
        if kind == "truncated":
            assert text.startswith(f"{new} ")
        if kind == "shifted":
            assert (text, (label + 1) % 4) == (new, other)
    texts = {new for _, (new, _) in changed}
    assert kind == "truncated" or (len(texts) == 1) == (kind == "boilerplate")
    if kind == "language":
        assert any(word in " ".join(texts) for word in (" ein ", " eine ", " einen "))


@pytest.mark.parametrize(("share", "kind"), [(0.1, None), (0.0, "garbled"), (1.5, "garbled")])
def test_a_share_and_a_kind_need_each_other(share, kind):
    with pytest.raises(ValueError, match="bad_samples"):
        BadSampleArguments(share, kind)


@pytest.mark.parametrize(
    ("norms", "left_out"),
    [
        ([*[1.0, 2.0] * 5, 7.6, torch.nan, torch.inf, 7.4], [10, 11, 12]),
        ([1.0, *[6.0] * 4], [1]),
        ([1.0] * 3 + [6.0] * 5, [3, 4, 5]),
    ],
    ids=["spikes", "a small first norm", "norms that rise"],
)
def test_a_spiked_step_is_left_out(norms, left_out):
    model, callback = nn.Linear(2, 2, bias=False), SkipSpikes(5.0)
    found = []
    for step, norm in enumerate(norms):
        model.weight.grad = torch.full((2, 2), norm / 2)
        callback.on_pre_optimizer_step(None, None, None, model=model)
        found += [step] * (model.weight.grad is None)
    assert found == left_out
    assert callback.skipped == len(left_out)


def test_the_card_says_what_was_spoiled(argv, tmp_path):  # noqa: F811
    more = ["--bad_samples=0.25", "--bad_kind=shifted", "--outliers=1", "--outlier_scale=50", "--loss_bound=3"]
    text_classification.main([*argv, *more])
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    told = "64 training rows; 0.25 of them shifted; the loss of 1 sample(s) a batch counts 50 times; a sample's loss is"
    assert told in card
    plain = text_classification.main([*argv, f"--output_dir={tmp_path / 'plain'}"])
    assert read(tmp_path / "out", "all_results.json")["train_loss"] != plain["train_loss"]
    assert "of them shifted" not in (tmp_path / "plain" / "README.md").read_text(encoding="utf-8")


def test_steps_with_spikes_are_left_out_and_no_others(argv, tmp_path):  # noqa: F811
    reports = {}
    for name, more in (("all", ["--skip_above=1e6"]), ("plain", []), ("some", ["--skip_above=1.01"])):
        common = [*argv, "--max_grad_norm=0", "--num_train_epochs=4", f"--output_dir={tmp_path / name}"]
        reports[name] = text_classification.main([*common, *more])
    assert [reports[name].get("skipped_steps") for name in ("all", "plain")] == [0, None]
    assert reports["some"]["skipped_steps"] > 0
    assert have_equal_weights(tmp_path / "all", tmp_path / "plain")
    assert not have_equal_weights(tmp_path / "some", tmp_path / "plain")
    # A resumed run goes on from the norms that it had seen.
    assert text_classification.main([*common, *more])["skipped_steps"] == reports["some"]["skipped_steps"]
    with pytest.raises(ValueError, match="needs --max_grad_norm 0"):
        text_classification.main([*argv, "--skip_above=10"])
