"""The pages of the documentation: their code runs, their links lead somewhere, and their tables say what the code says.

``python -m tests.test_docs`` writes the table of arguments anew.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import Trainer

from hf_fngd import FNGDConfig
from hf_fngd.layers import base as layers
from hf_fngd.updates import base as updates
from hf_fngd.weights import base as weights
from tests.modes.harness import arguments
from tests.modes.nets import bert

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "examples/*.md", "recipes/*.md", "recipes/results/*.md")
    for path in ROOT.glob(pattern)
)
SETTINGS_PAGE = "docs/choosing_settings.md"
FENCED = re.compile(r"^```.*?^```", flags=re.MULTILINE | re.DOTALL)


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def marked(page: str, marker: str) -> str:
    """What stands between ``<!-- marker -->`` and ``<!-- /marker -->``."""
    found = re.search(rf"<!-- {marker} -->\n?(.*?)<!-- /{marker} -->", text_of(page), flags=re.DOTALL)
    assert found is not None, f"{page} has no {marker}"
    return found[1]


# The first page -----------------------------------------------------------------------------------------


def test_the_first_page_is_short() -> None:
    lines = text_of("README.md").splitlines()
    assert len(lines) <= 120
    assert all(len(line) < 160 for line in lines)


def test_the_first_page_says_at_once_what_the_default_is_and_what_it_costs() -> None:
    begin = "\n".join(text_of("README.md").splitlines()[:10])
    assert all(word in begin for word in ("clips samples", "Muon", "option", "times as long as SGD's"))


def test_costs_of_a_step_are_those_of_the_table() -> None:
    table = marked("docs/results.md", "step-cost")
    figures = re.findall(r"\d\.\d\d", marked("README.md", "step-cost"))
    assert figures
    assert [figure for figure in figures if figure not in table] == []


# Links ----------------------------------------------------------------------------------------------------


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text_of(page)), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", text_of(page))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page} links to {link}"
        if anchor:
            assert anchor in anchors(target.resolve().relative_to(ROOT).as_posix()), f"{page} links to {link}"


# Code -----------------------------------------------------------------------------------------------------


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text_of(page), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def registries() -> Iterator[None]:
    """What a page registers is gone after it."""
    with mock.patch.dict(layers._LAYER_TYPES), mock.patch.dict(weights._POLICIES), mock.patch.dict(updates.RULES):
        yield


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize(("page", "number"), [(page, n) for page in PAGES for n in range(len(blocks(page)))])
def test_code_runs(page: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {
        "make_model": lambda: bert(),  # which takes no argument, as a `model_init` may not
        "model": bert(),
        "args": arguments(Path("outputs"), max_steps=2, max_grad_norm=1.0),
        "data": [{"input_ids": torch.randint(16, (6,)), "labels": n % 2} for n in range(8)],
        "Trainer": Trainer,
    }
    exec(compile(blocks(page)[number], f"{page}, block {number}", "exec"), names)
    trainer = names.get("trainer")
    if trainer is not None and trainer.state.global_step == 0:
        trainer.train()


# Arguments ------------------------------------------------------------------------------------------------


def settings_table() -> str:
    """The arguments, their defaults and what they do, from the fields of the config."""
    lines = ["| argument | default | what it does |", "|---|---|---|"]
    for field in dataclasses.fields(FNGDConfig):
        default = f"`{field.default!r}`".replace("'", '"')
        lines.append(f"| `{field.name}` | {default} | {field.metadata['help'].replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def test_the_table_of_arguments_is_that_of_the_config() -> None:
    assert marked(SETTINGS_PAGE, "settings") == settings_table(), "python -m tests.test_docs writes it anew"


if __name__ == "__main__":
    begin, end = "<!-- settings -->\n", "<!-- /settings -->"
    before, _, rest = text_of(SETTINGS_PAGE).partition(begin)
    (ROOT / SETTINGS_PAGE).write_text(
        before + begin + settings_table() + end + rest.partition(end)[2], encoding="utf-8"
    )
