"""The rules of the house, held over the source: which way imports run, and what stays data."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import grail_hf
from grail_hf.models.architectures import ARCHITECTURES, find_architecture

ROOT = Path(grail_hf.__file__).parent
MODULES = sorted(path.relative_to(ROOT).with_suffix("").as_posix() for path in ROOT.rglob("*.py"))

# A package, or a file beside them, may import those above it in this list, and nothing below it.
ORDER = [
    "settings",
    "config",
    "methods",
    "runtime",
    "models",
    "checkpoints",
    "calibration",
    "planning",
    "card",
    "recovery",
    "report",
    "forecast",
    "evaluation",
    "exports",
    "job",
    "compress",
    "disk_to_disk",
    "recover_checkpoint",
    "run",
    "__init__",
    "options",
    "cli",
    "__main__",
]
PURE = ["settings", "config", "methods"]
HEAVY = ["datasets", "lm_eval", "matplotlib", "accelerate", "peft", "transformers"]


def imports(source: str) -> Iterator[tuple[str, ...]]:
    """What is imported anywhere in the source, lazily too, as paths: ("grail_hf", "gram")."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            base = (["grail_hf"] if node.level else []) + (node.module or "").split(".")
            path = tuple(part for part in base if part)
            if path == ("grail_hf",):
                for alias in node.names:
                    yield (*path, alias.name)
            else:
                yield path


def house_imports(source: str) -> set[str]:
    """The places in `ORDER` that the source imports; a name of grail_hf itself is `__init__`."""
    paths = [path for path in imports(source) if path[0] == "grail_hf"]
    return {path[1] if len(path) > 1 and path[1] in ORDER else "__init__" for path in paths}


def place_of(module: str) -> str:
    return module.split("/")[0]


def uphill(place: str, source: str) -> set[str]:
    """Imports of a module in `place` that do not run downward; its own package is free."""
    return house_imports(source) - set(ORDER[: ORDER.index(place) + 1])


def impure(source: str) -> set[str]:
    """Imports that a module of pure tensor functions may not have."""
    outside = {path[0] for path in imports(source)} - {"grail_hf", "numpy", "torch"}
    return outside - sys.stdlib_module_names | house_imports(source) - set(PURE)


def family_comparisons(source: str) -> list[str]:
    """Comparisons with a model type's name, or of a `model_type` with any string."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            parts = [part for side in (node.left, *node.comparators) for part in ast.walk(side)]
        elif isinstance(node, ast.Match):
            parts = [part for case in node.cases for part in ast.walk(case.pattern)]
            parts += ast.walk(node.subject)
        else:
            continue
        strings = {
            part.value
            for part in parts
            if isinstance(part, ast.Constant) and isinstance(part.value, str)
        }
        names = {getattr(part, "attr", getattr(part, "id", None)) for part in parts}
        if strings & ARCHITECTURES.keys() or (strings and "model_type" in names):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def source_of(module: str) -> str:
    return (ROOT / f"{module}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downward(module):
    assert place_of(module) in ORDER, f"{module}.py has no place in ORDER: give it one"
    assert not uphill(place_of(module), source_of(module))


@pytest.mark.parametrize("package", sorted({m.split("/")[0] for m in MODULES if "/" in m}))
def test_a_package_says_what_lives_there_and_exports_nothing(package):
    (statement,) = ast.parse(source_of(f"{package}/__init__")).body
    assert isinstance(statement, ast.Expr)  # its docstring


@pytest.mark.parametrize("module", [name for name in MODULES if place_of(name) in PURE])
def test_the_mathematics_needs_torch_and_numpy_alone(module):
    assert not impure(source_of(module))


@pytest.mark.parametrize("module", [name for name in MODULES if name != "models/architectures"])
def test_knowledge_of_a_family_is_data(module):
    assert not family_comparisons(source_of(module))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from grail_hf.compress import compress", {"compress"}),
        ("from grail_hf import compress", {"compress"}),
        ("from . import planning", {"planning"}),
        ("from .planning.plan import Plan", {"planning"}),
        ("import grail_hf.report as r", {"report"}),
        ("import grail_hf", {"__init__"}),
        ("from grail_hf import GrailConfig", {"__init__"}),
        ("def f():\n    from grail_hf.report import x", {"report"}),
        ("from grail_hf.methods.gram import GramStats", set()),
        ("from grail_hf.models import groups", set()),
        ("import torch, transformers", set()),
    ],
)
def test_an_import_that_runs_upward_is_seen(source, found):
    assert uphill("models", source) == found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import numpy, scipy.linalg", {"scipy"}),
        ("from transformers.utils import logging", {"transformers"}),
        ("from grail_hf.models.groups import Group", {"models"}),
        ("import math, torch.nn\nfrom torch import Tensor\nfrom grail_hf.config import x", set()),
    ],
)
def test_an_import_that_is_not_pure_is_seen(source, found):
    assert impure(source) == found


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("config.model_type == 'other'", 1),
        ("'other' != model_type", 1),
        ("kind in ('x', 'llama')", 1),
        ("type(model).__name__.lower() == 'mistral'", 1),
        ("match config.model_type:\n    case 'other': pass", 1),
        ("'model_type' in keys and a == b", 0),
        ("config.model_type != model.config.model_type", 0),
        ("entry = ARCHITECTURES['llama']", 0),
    ],
)
def test_a_comparison_with_a_family_is_seen(source, count):
    assert len(family_comparisons(source)) == count


def test_importing_the_package_is_light():
    """In a process of its own; what is heavy loads when it is first used."""
    script = f"import sys, grail_hf; print(*(name for name in {HEAVY} if name in sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.split() == []


@pytest.mark.parametrize(
    "name", [name for name in grail_hf.__all__ if callable(getattr(grail_hf, name))]
)
def test_what_is_public_says_what_it_is(name):
    """A dataclass without a docstring gets its signature for one, which says nothing."""
    doc = getattr(grail_hf, name).__doc__
    assert doc and not doc.startswith(f"{name}(")


@pytest.mark.parametrize("key", ARCHITECTURES)
def test_an_architecture_is_listed_under_its_own_name(key):
    assert ARCHITECTURES[key].model_type == key
    assert find_architecture(key) is ARCHITECTURES[key]


@pytest.mark.parametrize(("wrong", "nearest"), [("lama", "llama"), ("qwen_3", "qwen3")])
def test_an_unknown_architecture_is_refused_with_the_nearest_and_where_to_add_it(wrong, nearest):
    with pytest.raises(ValueError, match=f"'{wrong}' is not known; did you mean '{nearest}'") as e:
        find_architecture(wrong)
    assert ", ".join(ARCHITECTURES) in str(e.value)
    assert "grail_hf/models/architectures.py" in str(e.value)


def test_an_architecture_like_no_other_is_refused_in_whole_sentences():
    with pytest.raises(ValueError, match=r"'zzz' is not known\. Known: "):
        find_architecture("zzz")
    with pytest.raises(ValueError, match=r"did you mean 'llama'\? Known: "):
        find_architecture("lama")
