"""How the coverage report reads, and what is said with it."""

import pytest

from hf_fngd import CoverageReport, FNGDPreconditioner
from tests.nets import data, loss, net


def test_reasons_are_grouped_and_long_lists_cut() -> None:
    report = CoverageReport(
        preconditioned=("fc.weight",),
        plain={"norm.weight": "a norm", "norm.bias": "a norm", "head.weight": "tied"},
        missed={f"layers.{n}.weight": "called twice" for n in range(6)},
    )
    assert str(report).splitlines() == [
        "FNGD preconditions 1 parameters.",
        "  2 plain gradient: a norm (norm.weight, norm.bias)",
        "  1 plain gradient: tied (head.weight)",
        "  6 could not be preconditioned: called twice (layers.0.weight, layers.1.weight, layers.2.weight, "
        "layers.3.weight, and 2 more)",
    ]


def test_a_report_without_exceptions_is_one_line() -> None:
    assert str(CoverageReport(("a", "b"), {}, {})) == "FNGD preconditions 2 parameters."


@pytest.mark.parametrize(("samples", "warned"), [(1, 1), (2, 0)])
def test_a_single_sample_is_remarked_once(samples: int, warned: int, caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    preconditioner = FNGDPreconditioner(model)
    for _ in range(3):
        loss(model, *data(samples, 3)).backward()
        preconditioner.step()
    assert sum("without packing" in record.message for record in caplog.records) == warned
