"""The report's sections, of records that were never run: time, the gap, the grids."""

from pathlib import Path

import pytest

from comparison.plan import load
from comparison.report import report
from comparison.results import Results
from tests.recipes.comparison_setting import Setting, row

TARGETS, STEP = "## Epochs and seconds to a target", "## Time of a step"
GAP, GRIDS = "## Training and validation loss", "## Grids"
ONE_POINT = {"a": {"options": {"optimizer": "a"}}, "b": {"options": {"optimizer": "b"}}}


class Page:
    """A comparison whose runs are written down."""

    def __init__(self, folder, **changes):
        self.comparison = load(Path(Setting(folder, **({"final": {"seeds": [1, 2]}} | changes)).argv[0]))
        self.results = Results(folder / "results.jsonl")

    def finish(self, runs, curve=(), jobs=1, **metrics):
        """Let runs finish with an evaluation an epoch, of two steps each."""
        for run in runs:
            events = [{"epoch": e, "step": 2 * e, "eval_score": score} for e, score in enumerate(curve, 1)]
            outcome = {"metrics": {"eval_score": curve[-1] if curve else None} | metrics, "curve": events}
            self.results.append(run, {"status": "finished", "jobs": jobs} | outcome)

    def final(self, arm, seed, *curve, **values):
        """Let the final run of an arm and a seed finish."""
        runs = self.comparison.final_runs({arm: self.comparison.arms[arm].points()[0]})
        self.finish([run for run in runs if run.seed == seed], curve, **values)

    def screen(self, arm, scores):
        """Let the screening of an arm finish, a score a point; None fails."""
        runs = [run for run in self.comparison.screen_runs() if run.arm == arm]
        for run, score in zip(runs, scores, strict=True):
            if score is None:
                self.results.append(run, {"status": "failed", "error": "e", "jobs": 1})
            else:
                self.finish([run], (score,))

    def text(self):
        """Return the report."""
        return report(self.comparison, self.results)

    def row(self, name, section):
        """Return the cells of a row."""
        return row(self.text(), name, section)


@pytest.fixture
def page(tmp_path):
    return Page(tmp_path, arms=ONE_POINT)


def test_a_target_is_reached_at_the_first_evaluation_that_has_it(page):
    page.final("a", 1, 1, 5, 4, 6, step_seconds_mean=0.5)
    page.final("a", 2, 1, 2, 3, 6, step_seconds_mean=0.5)
    page.final("b", 1, 4, 4, 4, 4, step_seconds_mean=2.0)
    page.final("b", 2, 1, 1, 4, 4, step_seconds_mean=4.0)
    # The final 4 of b, the weakest, and 6 of a, the reference. a: epochs 2 and 4, b: epochs 1 and 3.
    assert page.row("optimizer", TARGETS)[1:] == [
        "best eval_score",
        *("4: epochs", "4: seconds", "6: epochs", "6: seconds"),
    ]
    assert page.row("a", TARGETS) == ["a", "6", "3", "3", "4", "4"]
    assert page.row("b", TARGETS) == ["b", "4", "2", "14", "-", "-"]  # seconds (2 * 2 + 6 * 4) / 2
    assert "Targets: 4 (the weakest at the end: b); 6 (the reference at the end: a)." in page.text()


def test_seeds_that_miss_a_target_are_counted(page):
    page.final("a", 1, 1, 5)
    page.final("a", 2, 1, 3)
    page.final("b", 1, 9)
    assert page.row("a", TARGETS)[2:4] == ["2 (1 of 2)", "-"]  # the mean is 4; no time was taken


def test_seconds_to_a_target_are_related_to_the_reference(tmp_path):
    page = Page(tmp_path, arms=ONE_POINT, reference="b", maximize=False)
    page.final("a", 1, 4, 3, 2, step_seconds_mean=3.0)
    page.final("b", 1, 4, 3, 1, step_seconds_mean=1.5)
    assert page.row("a", TARGETS) == ["a", "2", "3", "18", "-", "-"]
    assert page.row("a", STEP)[3] == "2.00"


def test_the_weakest_of_a_loss_has_the_largest(tmp_path):
    page = Page(tmp_path, arms=ONE_POINT, maximize=False, reference="b")
    page.final("a", 1, 4, 3)
    page.final("b", 1, 2, 1)
    assert "Targets: 3 (the weakest at the end: a); 1 (the reference at the end: b)." in page.text()


def test_the_final_value_counts_as_an_evaluation(page):
    page.final("a", 1, 1, 2, eval_score=9)  # measured behind the last event, otherwise
    page.final("b", 1, 1, 10)
    assert page.row("a", TARGETS)[2] == "2"


def test_the_time_of_a_step_is_divided_and_related_to_the_reference(page):
    parts = {"step_seconds_forward": 0.5, "step_seconds_backward": 1.0, "step_seconds_update": 0.5}
    for seed in (1, 2):
        page.final("a", seed, 1, step_seconds_mean=2.0, **parts)
    page.final("b", 1, 1, 2, step_seconds_mean=4.0)
    page.final("b", 2, 1, 2, step_seconds_mean=6.0)
    assert page.row("a", STEP) == ["a", "2", "4", "1.00", "0.25", "0.50", "0.25"]
    assert page.row("b", STEP) == ["b", "5", "10", "2.50", "-", "-", "-"]  # a line from before the parts were timed
    assert "4 of the runs do not say on which hardware" in page.text()


def test_times_of_unlike_circumstances_are_remarked(page):
    page.final("a", 1, 1, hardware="x, 1 thread(s)")
    page.final("a", 2, 1, hardware="x, 1 thread(s)")
    page.final("b", 1, 1, hardware="x, 1 thread(s)")
    assert "not comparable" not in page.text()
    page.final("b", 2, 1, hardware="y", jobs=3)
    assert "- Final runs were made on x, 1 thread(s); on y: their seconds are not comparable.\n" in page.text()
    assert "some were made by 1 and others by up to 3 processes side by side" in page.text()
    assert "do not say on which hardware" not in page.text()


def test_the_gap_is_that_of_each_run(page):
    assert GAP not in page.text()
    page.final("a", 1, 1, train_nll=1.0, eval_nll=3.0)
    page.final("a", 2, 1, train_nll=2.0, eval_nll=3.0)
    page.final("b", 1, 1)
    assert page.row("optimizer", GAP) == ["optimizer", "train_nll", "eval_nll", "gap"]  # no logged loss
    assert page.row("a", GAP)[1:] == ["1.5 ± 0.71 (1 to 2)", "3 ± 0 (3 to 3)", "1.5 ± 0.71 (1 to 2)"]
    assert page.row("b", GAP)[1:] == ["-"] * 3


def test_the_logged_loss_is_the_last_one(page):
    page.final("a", 1, 1, train_nll=1.0, eval_nll=3.0)
    run = page.comparison.final_runs({"b": {}})[0]
    curve = [{"epoch": 1, "step": 1, "loss": 7.0}, {"epoch": 2, "step": 2, "loss": 6.0}]
    page.results.append(run, {"status": "finished", "jobs": 1, "metrics": {"eval_score": 1}, "curve": curve})
    assert page.row("a", GAP) == ["a", "-", "1", "3", "2"]
    assert page.row("b", GAP) == ["b", "6", *["-"] * 3]


def test_grids_are_pivoted_by_the_common_option(tmp_path):
    arms = {
        "a": {"grid": {"lr": ["1e-1", 0.2, 0.4], "width": [1, 2]}},
        "b": {"grid": {"lr": [0.1, 0.2]}},
        "c": {"grid": {"depth": [3, 4]}},
        "d": {"grid": {"lr": [0.1, 0.8]}},
    }
    page = Page(tmp_path, arms=arms)
    page.screen("a", [1, 2, 3, 8, 5, None])
    page.screen("b", [7, 9])
    page.screen("c", [6, None])
    table = page.text().partition(GRIDS)[2]
    assert "| optimizer | point | lr 0.1 | lr 0.2 | lr 0.4 | mean loss | largest loss |" in table
    assert "| a | width 1 | 1 | 3 | 5 | 3 | 4 |" in table
    assert "| a | width 2 | 2 | 8 | failed | - | - |" in table
    assert "| b | - | 7 | 9 |  | 2 | 2 |" in table
    assert "| optimizer | depth 3 | depth 4 | mean loss | largest loss |" in table
    assert "| c | 6 | failed | - | - |" in table
    assert "| d |" not in table  # nothing has run
    assert "the largest lr it is a factor of a: 4; b: 2." in table


def test_the_loss_of_a_metric_that_is_minimized_is_positive_too(tmp_path):
    arms = {"a": {"grid": {"lr": [1, 2, 4]}}, "b": {"grid": {"lr": [2, 4, 8]}}}
    page = Page(tmp_path, arms=arms, maximize=False)
    page.screen("a", [6, 2, 3])
    page.screen("b", [2, 2, 2])
    assert page.row("a", GRIDS) == ["a", "6", "2", "3", "", "2.5", "4"]
    assert "factor" not in page.text()  # both span 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "c"}, "has the reference 'c', which is no arm; the arms are a, b"),
        ({"arms": {}}, "has no arms; name at least one"),
    ],
)
def test_bad_references_and_arms_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Page(tmp_path, **changes)


def test_the_reference_is_the_first_arm_or_the_first_that_is_kept(tmp_path):
    path = Path(Setting(tmp_path).argv[0])
    assert load(path).reference == "a"
    assert load(path, arms=["b"]).reference == "b"


def test_the_reference_is_no_part_of_what_a_run_is(tmp_path):
    plain = load(Path(Setting(tmp_path).argv[0])).screen_runs()
    other = load(Path(Setting(tmp_path, reference="b").argv[0])).screen_runs()
    assert [run.key for run in plain] == [run.key for run in other]
