"""Wrong targets in the training split, and what they are scored at."""

from __future__ import annotations

import json
import math

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F

import translate
from common.tokenizer import train_tokenizer
from tests.recipes.translate_pairs import PAIRS, TINY_MODEL, write_splits
from translation.arguments import DataArguments
from translation.data import encode
from translation.noise import add_noise
from translation.trainer import TranslationTrainer, mean_nll


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([text for pair in PAIRS for text in pair.values()], 300)


@pytest.fixture(scope="module")
def clean(tokenizer):
    pairs = Dataset.from_dict({"source": [pair["en"] for pair in PAIRS], "target": [pair["de"] for pair in PAIRS]})
    return encode(pairs, tokenizer, DataArguments(), "Tokenizing")


def changed(clean, noisy):
    """Return the rows whose targets differ."""
    return [row for row, (a, b) in enumerate(zip(clean["labels"], noisy["labels"], strict=True)) if a != b]


@pytest.mark.parametrize("share", [2 / 64, 0.3, 1.0])
def test_misaligned_targets_change_places_and_none_stays(clean, tokenizer, share):
    noisy, noise = add_noise(clean, tokenizer, DataArguments(misaligned=share), seed=3)
    assert len(noise.misaligned) == round(64 * share)
    assert changed(clean, noisy) == noise.misaligned  # the 64 targets differ from each other
    assert sorted(noisy["labels"]) == sorted(clean["labels"])
    assert noisy["input_ids"] == clean["input_ids"]
    assert noisy["length"] == [max(len(row["input_ids"]), len(row["labels"])) for row in noisy]
    assert set(noisy.column_names) == set(clean.column_names)
    assert noise.report() == {"misaligned_pairs": len(noise.misaligned), "random_target_pairs": 0, "noise_seed": 3}


def test_random_targets_have_the_length_of_the_right_ones(clean, tokenizer):
    noisy, noise = add_noise(clean, tokenizer, DataArguments(random_targets=0.5), seed=3)
    assert len(noise.random) == 32
    assert changed(clean, noisy) == noise.random
    assert [len(ids) for ids in noisy["labels"]] == [len(ids) for ids in clean["labels"]]
    for row in noise.random:
        *words, last = noisy["labels"][row]
        assert last == tokenizer.eos_token_id
        assert not {*words} & {*tokenizer.all_special_ids}
    tokens = {token for row in noise.random for token in noisy["labels"][row]}
    assert len(tokens) > 100  # of 300: all kinds, not those of the corpus


def test_both_kinds_hit_different_pairs_which_their_seed_alone_decides(clean, tokenizer):
    both = DataArguments(misaligned=0.5, random_targets=0.5)
    noisy, noise = add_noise(clean, tokenizer, both, seed=3)
    assert sorted(noise.rows) == list(range(64))
    again, _ = add_noise(clean, tokenizer, both, seed=3)
    assert again["labels"] == noisy["labels"]
    alone = add_noise(clean, tokenizer, DataArguments(misaligned=0.5), seed=3)[1]
    assert alone.misaligned == noise.misaligned
    assert add_noise(clean, tokenizer, both, seed=4)[1].misaligned != noise.misaligned
    named = DataArguments(misaligned=0.5, random_targets=0.5, noise_seed=3)
    assert add_noise(clean, tokenizer, named, seed=4)[1] == noise


def test_no_noise_leaves_the_split_as_it_is(clean, tokenizer):
    noisy, noise = add_noise(clean, tokenizer, DataArguments(), seed=3)
    assert noisy is clean
    assert noise.report() == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outliers": -1}, r"outliers is -1"),
        ({"misaligned": -0.1}, r"misaligned=-0.1 and random_targets=0 must be shares"),
        ({"misaligned": 0.6, "random_targets": 0.5}, r"between 0 and 1, also together"),
    ],
)
def test_shares_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**options)


@pytest.mark.parametrize(("name", "share", "least"), [("misaligned", 0.02, 2), ("random_targets", 0.001, 1)])
def test_a_share_of_no_pair_is_an_error(clean, tokenizer, name, share, least):
    with pytest.raises(ValueError, match=rf"{name}={share} of 64 training pairs .* takes {least} at least"):
        add_noise(clean, tokenizer, DataArguments(**{name: share}), seed=0)


def test_a_run_tells_its_noise_and_scores_both_kinds_of_pairs(tmp_path, monkeypatch):
    scored = []
    log_likelihoods = TranslationTrainer.log_likelihoods

    def spy(self, encoded):
        result = log_likelihoods(self, encoded)
        scored.append((self.model, encoded, result))
        return result

    monkeypatch.setattr(TranslationTrainer, "log_likelihoods", spy)
    argv = [f"--dataset_name={write_splits(tmp_path / 'pairs')}", f"--output_dir={tmp_path / 'out'}", *TINY_MODEL]
    argv += ["--optimizer=adamw", "--max_steps=12", "--disable_tqdm=true", "--per_device_eval_batch_size=5"]
    translate.main([*argv, "--misaligned=0.4", "--random_targets=0.1", "--noise_seed=7", "--dropout=0.5"])
    report = json.loads((tmp_path / "out" / "all_results.json").read_text(encoding="utf-8"))
    assert (report["misaligned_pairs"], report["random_target_pairs"], report["noise_seed"]) == (26, 6, 7)
    assert report["step_seconds_forward"] > 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "64 training pairs, 26 of them with each other's targets and 6 with random ones (noise seed 7)" in card

    (model, validation, _), (_, first, scores) = scored
    assert (len(validation), len(first)) == (16, 16)
    for row in (0, 15):  # a pair by itself: no dropout, no smoothing, no padding
        labels = torch.tensor([first[row]["labels"]])
        shifted = torch.cat([torch.tensor([[0]]), labels[:, :-1]], dim=1)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([first[row]["input_ids"]]), decoder_input_ids=shifted).logits
        assert scores[row, 0].item() == pytest.approx(F.cross_entropy(logits[0], labels[0], reduction="sum").item())
        assert scores[row, 1] == labels.numel()
    assert report["train_nll"] == pytest.approx((scores[:, 0].sum() / scores[:, 1].sum()).item())
    assert report["eval_nll"] < report["eval_loss"]  # which has label smoothing
    low, high = sorted([report["train_nll_wrong"], report["train_nll_right"]])
    assert low < report["train_nll"] < high


def test_the_mean_is_over_tokens():
    assert mean_nll(torch.tensor([[3.0, 1.0], [1.0, 3.0]])) == 1.0
    assert mean_nll(torch.zeros(0, 2)) is None
    assert math.isnan(mean_nll(torch.tensor([[math.nan, 1.0]])))
