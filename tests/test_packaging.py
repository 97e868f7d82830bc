"""pyproject.toml: what the package imports is what it declares."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import grail_hf

ROOT = Path(grail_hf.__file__).parent


def third_party_imports() -> set[str]:
    """The top-level names that the package imports anywhere, lazily too."""
    found: set[str] = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names - {"grail_hf"}


def test_every_import_is_a_declared_dependency():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    declared = {
        re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")
        for requirement in sum(extras.values(), project["dependencies"])
    }
    distributions = packages_distributions()
    for name in third_party_imports():
        names = {one.lower().replace("_", "-") for one in distributions.get(name, [name])}
        assert names & declared, f"grail_hf imports {name}, which pyproject.toml does not declare"
