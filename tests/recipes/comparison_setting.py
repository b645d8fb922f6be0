"""A comparison of the fake recipe, for the tests."""

import json
from pathlib import Path

import yaml

import compare


def row(page, name, section):
    """Return the cells of a row of a report, by the name in its first cell and the title of its section."""
    lines = page.partition(f"{section}\n")[2].partition("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    return next(cells for cells in rows if cells[0] == name)


class Setting:
    """A comparison of the fake recipe, in a folder of its own."""

    def __init__(self, folder, **changes):
        self.folder = folder
        self.values = {
            "recipe": str(Path(__file__).with_name("fake_recipe.py")),
            "metric": "eval_score",
            "test_metrics": ["test_score"],
            "options": {"mode": ""},
            "screen": {"options": {"epochs": 1}},
            "final": {"seeds": [1, 2, 4], "options": {"epochs": 3}},
            "arms": {
                "a": {"options": {"optimizer": "a"}, "grid": {"lr": [0.1, 0.3, 0.2]}},
                "b": {"options": {"optimizer": "b"}, "grid": {"lr": [0.4, 0.2, 0.3]}},
            },
        } | changes

    @property
    def argv(self):
        """Return the command line."""
        file = self.folder / "toy.yaml"
        file.write_text(yaml.safe_dump(self.values), encoding="utf-8")
        return [str(file), f"--results_dir={self.folder / 'results'}", f"--output_dir={self.folder / 'out'}"]

    def run(self, *argv):
        """Run the comparison; return its exit code."""
        return compare.main([*self.argv, *argv])

    def calls(self):
        """Return how often the recipe was started."""
        file = self.folder / "out" / "calls.txt"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def lines(self):
        """Return the records."""
        file = self.folder / "results" / "toy.jsonl"
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    def page(self):
        """Return the report."""
        return (self.folder / "results" / "toy.md").read_text(encoding="utf-8")

    def row(self, name, section="## Best grid points"):
        """Return the cells of a section's row of that name."""
        return row(self.page(), name, section)
