"""The order of the package: seven rooms and a few files between them, imports only descend, no file is long."""

import ast
from pathlib import Path

import pytest

import hf_fngd

ROOT = Path(hf_fngd.__file__).parent

# From the bottom to the top. A module imports from lower layers, and from its own room.
ORDER = [
    {"stack"},
    {"distributed", "checks"},
    {"weights"},
    {"samples"},
    {"layers", "clipping"},
    {"engine", "updates"},
    {"settings", "hub"},
    {"config"},
    {"preconditioner"},
    {"optimizer"},
    {"trainer"},
    {"__init__"},
]
ROOMS = {"distributed", "weights", "samples", "layers", "engine", "updates", "trainer"}
LONGEST = 300  # lines of a file
LAYER = {name: place for place, names in enumerate(ORDER) for name in names}

# Who may know these libraries; everybody else needs torch alone.
LIBRARIES = {
    "transformers": {"hf_fngd.layers.linear", "hf_fngd.trainer.callbacks"},
    "huggingface_hub": {"hf_fngd.hub"},
    "accelerate": set(),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(name: str) -> set[str]:
    """The modules that a module imports, wherever in it; absolute names."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else str(node.module))
    return found


def part(name: str) -> str:
    """The part of the package that a module belongs to."""
    return name.split(".")[1] if "." in name else "__init__"


INSIDE = {name: {other for other in imports(name) if other in MODULES} for name in MODULES}


def test_every_part_has_its_place() -> None:
    assert {part(name) for name in MODULES} == set(LAYER)
    assert {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()} == ROOMS


@pytest.mark.parametrize("name", MODULES)
def test_a_file_has_one_purpose_that_its_first_line_says_and_is_not_long(name: str) -> None:
    text = MODULES[name].read_text()
    assert (ast.get_docstring(ast.parse(text)) or "").splitlines()[0].endswith((".", ":"))
    assert text.count("\n") <= LONGEST


@pytest.mark.parametrize("name", MODULES)
def test_imports_only_descend(name: str) -> None:
    for other in INSIDE[name]:
        if part(other) != part(name):
            assert LAYER[part(other)] < LAYER[part(name)], f"{name} imports {other}"


def test_there_are_no_cycles() -> None:
    left = {name: set(of) - {name} for name, of in INSIDE.items()}
    while leaves := {name for name, of in left.items() if not of}:
        left = {name: of - leaves for name, of in left.items() if name not in leaves}
    assert left == {}


@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_are_known_where_they_have_to_be(library: str) -> None:
    users = {name for name in MODULES if any(other.split(".")[0] == library for other in imports(name))}
    assert users == LIBRARIES[library]


def test_the_engine_knows_neither_transformers_nor_the_config() -> None:
    reached, todo = set(), ["hf_fngd.preconditioner"]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += INSIDE[name]
    assert not {"hf_fngd.config", "hf_fngd.hub"} & reached
    assert not any(name.startswith("hf_fngd.trainer") for name in reached)


@pytest.mark.parametrize("name", MODULES)
def test_the_facade_is_for_users_alone(name: str) -> None:
    assert "hf_fngd" not in INSIDE[name]


def test_the_facade_exports_what_it_lists() -> None:
    assert all(hasattr(hf_fngd, name) for name in hf_fngd.__all__)
    assert len(set(hf_fngd.__all__)) == len(hf_fngd.__all__)
