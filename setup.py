"""What pyproject.toml cannot say: a package index shows README.md away from the files that it links to."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent


def readme() -> str:
    """README.md with absolute links, to the address that pyproject.toml gives."""
    address = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"(!\[[^]]*\]\()(?![a-z]+:|#)", rf"\1{address}/raw/main/", text)
    return re.sub(r"((?<!!)\[[^]]*\]\()(?![a-z]+:|#)", rf"\1{address}/blob/main/", text)


setup(long_description=readme(), long_description_content_type="text/markdown")
