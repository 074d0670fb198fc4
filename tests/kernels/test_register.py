"""What this project relies on in other libraries is there, and whatever private name it uses is registered."""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from mmllm.kernels.register import PRIVATE_NAMES, PrivateName, explain_mismatch

ROOT = Path(__file__).parent.parent.parent
REGISTERED = {part for entry in PRIVATE_NAMES for part in re.split("[:.]", entry.name)}


@pytest.mark.parametrize("entry", PRIVATE_NAMES, ids=lambda entry: entry.name)
def test_what_is_relied_on_is_there(entry: PrivateName) -> None:
    if entry.package and find_spec(entry.package) is None:
        pytest.skip(f"{entry.package} is not installed")
    assert explain_mismatch(entry) is None


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (PrivateName("torch:_no_such_name", "a test"), "torch:_no_such_name is not there"),
        (PrivateName("torch.nn:Linear.forward", "a test", ("input", "nonsense")), "does not take nonsense any more"),
    ],
)
def test_what_is_missing_is_named_with_its_use(entry: PrivateName, why: str) -> None:
    problem = explain_mismatch(entry)
    assert problem is not None
    assert why in problem
    assert "used for: a test" in problem


def own_names(tree: ast.Module) -> set[str]:
    """Names that the file defines itself: functions, classes, fields of classes, and attributes that it assigns."""
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    stored = {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    fields = {
        line.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }
    return defined | stored | fields


def foreign_names(tree: ast.Module) -> set[str]:
    """Private attributes and imports that are not the file's own, and private methods that it calls by `super()`."""
    own, names = own_names(tree), set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(
            ("mmllm", "projector", "demo", "__")
        ):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            is_super = isinstance(node.value, ast.Call) and ast.unparse(node.value) == "super()"
            if is_super or node.attr not in own:
                names.add(node.attr)
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


@pytest.mark.parametrize(
    "path",
    sorted(path.relative_to(ROOT) for room in ("mmllm", "projector", "demo") for path in (ROOT / room).rglob("*.py")),
    ids=str,
)
def test_no_private_name_of_another_library_is_used_unregistered(path: Path) -> None:
    parents = {"_indices", "_probe"}  # of the towers' base class, which is ours
    assert foreign_names(ast.parse((ROOT / path).read_text())) <= REGISTERED | parents
