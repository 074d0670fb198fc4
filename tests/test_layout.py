"""The design holds: who may import whom, how large things are, and that importing the library does nothing."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = ("projector", "mmllm")
ABOVE_LIBRARY = ("train", "demo", "bench", "tests")

# A floor a row: a room, or a file that stands beside the rooms, imports itself and what is on the floors before it.
FLOORS = (
    ("errors", "fault_points", "processes"),
    ("paths", "locks", "disk", "batch", "compatibility"),
    ("images", "web_page"),
    ("config",),
    ("chat", "scenes", "kernels", "readers", "backbone_files"),
    ("data", "model"),
    ("checkpoint", "batching"),
    ("inference",),
    ("evaluation", "captioning", "diagnose", "optimizers"),
    ("distributed",),
    ("runs",),
    ("training",),
    ("warmup", "feature_cache"),
    ("stages",),
    ("interop",),
    ("api",),
    ("cli",),
)
LEVELS = {room: level for level, row in enumerate(FLOORS) for room in row}
DEMO_USES = {
    "paths",
    "batch",
    "images",
    "web_page",
    "scenes",
    "errors",
    "chat",
    "inference",
}  # nothing of models and training
HEAVY = {"torch", "torchvision", "transformers", "open_clip", "accelerate", "datasets", "gradio", "matplotlib", "peft"}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_FOLDERS = 2
MAX_FILES = 16  # of a room, with its __init__.py
VAGUE_NAMES = {"util", "utils", "common", "helper", "helpers", "misc", "legacy"}
# Calls that configure, look for devices, read arguments or download, and so have no place at module level.
WORK = {
    "basicConfig",
    "parse_args",
    "ArgumentParser",
    "manual_seed",
    "seed",
    "set_num_threads",
    "set_float32_matmul_precision",
    "is_available",
    "device_count",
    "from_pretrained",
    "hf_hub_download",
    "snapshot_download",
    "mkdir",
}


def python_files(*folders: str) -> list[Path]:
    """Every Python file of these top folders, relative to the checkout; a folder that is not there has none."""
    return sorted(path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py"))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=str(path))


def imports(tree: ast.Module, path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, inside functions too; relative ones are made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = path.parent.parts[: len(path.parent.parts) - node.level + 1] if node.level else ()
            base = ".".join((*here, *([node.module] if node.module else [])))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room_of(dotted: str) -> str | None:
    """`mmllm.chat.renderer` is in the room `data`; `mmllm` itself and other packages are in none."""
    package, _, rest = dotted.partition(".")
    return rest.split(".")[0] or None if package == "mmllm" else None


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def may_import(room: str, other: str) -> bool:
    return room == other or LEVELS[other] < LEVELS[room]


def without_type_checking(tree: ast.Module) -> ast.Module:
    """The file without what stands under `if TYPE_CHECKING:`."""
    kept = [node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
    return ast.Module(kept, [])


def statements_run_at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """All nodes that are evaluated when the module is imported: not those inside functions or under `__main__`."""
    waiting: list[ast.AST] = [node for node in tree.body if "__main__" not in ast.dump(node)]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += [*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)]
        elif not isinstance(node, ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def test_imports_are_found_wherever_they_stand():
    code = (
        "import a.b\ndef f():\n    from c import d\n    from . import e\n    from ..g.h import i\n    from .. import j"
    )
    found = set(imports(ast.parse(code), Path("mmllm/model/vlm.py")))
    assert found == {"a.b", "c.d", "mmllm.model.e", "mmllm.g.h.i", "mmllm.j"}


def test_the_floors_are_those_of_the_design():
    assert may_import("cli", "interop")
    assert may_import("model", "chat")
    assert may_import("training", "evaluation")
    assert not may_import("model", "data")
    assert not may_import("data", "model")
    assert not may_import("inference", "evaluation")
    assert not may_import("checkpoint", "inference")
    assert not may_import("config", "cli")


@pytest.mark.parametrize("path", python_files("projector"), ids=str)
def test_projector_needs_torch_alone(path):
    packages = {name.split(".")[0] for name in imports(tree_of(path), path)}
    assert packages <= {"torch", "projector"} | sys.stdlib_module_names


@pytest.mark.parametrize("path", python_files(*LIBRARY), ids=str)
def test_the_library_never_imports_what_stands_on_it(path):
    packages = {name.split(".")[0] for name in imports(tree_of(path), path)}
    assert not packages & set(ABOVE_LIBRARY)


@pytest.mark.parametrize("path", python_files("mmllm"), ids=str)
def test_rooms_import_only_rooms_before_them(path):
    room = room_of(module_of(path))
    if room is None:  # mmllm/__init__.py: of every floor, but only when a name is used
        named = {name for name in imports(without_type_checking(tree_of(path)), path) if name.startswith("mmllm")}
        assert not named, "mmllm/__init__.py imports its names in __getattr__, so that `import mmllm` stays quick"
        return
    others = {room_of(name) for name in imports(tree_of(path), path)}
    assert room in LEVELS, f"mmllm/{room} has no place in FLOORS; say there what it may import"
    wrong = sorted(other for other in others & LEVELS.keys() if not may_import(room, other))
    assert not wrong, f"{path} is in {room}, which may not import {', '.join(wrong)}"


@pytest.mark.parametrize("path", python_files("tests"), ids=str)
def test_a_test_imports_builders_and_no_other_test(path):
    ours = {name for name in imports(tree_of(path), path) if name.split(".")[0] == "tests"}
    assert [name for name in sorted(ours) if not f"{name}.".startswith("tests.builders.")] == []


def test_the_tests_stand_in_the_rooms_of_what_they_test():
    rooms = {*LEVELS, *LIBRARY, *ABOVE_LIBRARY, "builders"}
    for path in python_files("tests"):
        if len(path.parts) > 2:
            assert path.parts[1] in rooms, f"{path}: no room and no package is called {path.parts[1]}"
            assert path.stem.startswith("test_") != (path.parts[1] == "builders"), f"{path}: builders hold no tests"


def test_no_files_import_each_other_in_a_circle():
    """Nor inside functions: a circle is one file that was cut in two. Imports for type checkers alone do not count."""
    modules = {module_of(path): path for path in python_files(*LIBRARY, "demo")}
    arrows: dict[str, set[str]] = {}
    for module, path in modules.items():
        named = set(imports(without_type_checking(tree_of(path)), path))
        arrows[module] = {name if name in modules else name.rpartition(".")[0] for name in named} & modules.keys()
    try:
        TopologicalSorter({module: found - {module} for module, found in arrows.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of files: {' -> '.join(error.args[1])}")


def test_a_room_has_about_a_dozen_files_and_no_class_name_stands_twice():
    rooms = Counter(path.parts[1] for path in python_files("mmllm") if len(path.parts) == 3)
    assert {room: count for room, count in rooms.items() if count > MAX_FILES} == {}
    homes: dict[str, list[str]] = defaultdict(list)
    for path in python_files(*LIBRARY, "demo"):
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(str(path))
    assert {name: places for name, places in homes.items() if len(places) > 1} == {}


@pytest.mark.parametrize("path", python_files("demo"), ids=str)
def test_the_page_talks_to_inference(path):
    assert {room for name in imports(tree_of(path), path) if (room := room_of(name))} & LEVELS.keys() <= DEMO_USES


@pytest.mark.parametrize("path", python_files(*LIBRARY, *ABOVE_LIBRARY), ids=str)
def test_files_and_functions_are_small_and_named_after_what_they_do(path):
    assert len(path.parts) - 1 <= MAX_FOLDERS, f"{path} is more than {MAX_FOLDERS} folders deep"
    words = {word for part in path.with_suffix("").parts for word in part.lower().split("_")}
    assert not words & VAGUE_NAMES, f"{path}: name the file after the feature"
    num_lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_FILE_LINES, f"{path} has {num_lines} lines"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert num_lines <= MAX_FUNCTION_LINES, f"{path}:{node.lineno} {node.name} has {num_lines} lines"


@pytest.mark.parametrize("path", python_files(*LIBRARY, "train", "demo", "bench"), ids=str)
def test_the_ignored_label_is_defined_in_batch_alone(path):
    if path == Path("mmllm/batch.py"):
        return
    tree = tree_of(path)
    numbers = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.UnaryOp)]
    names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    assert "-100" not in numbers, f"{path}: import IGNORE_INDEX from mmllm.batch"
    assert "IGNORE_INDEX" not in names, f"{path}: IGNORE_INDEX lives in mmllm/batch.py"


def test_the_ignored_label_is_the_one_that_torch_and_transformers_use():
    from mmllm.batch import IGNORE_INDEX

    assert IGNORE_INDEX == -100


@pytest.mark.parametrize("path", python_files(*LIBRARY, "train", "demo", "bench"), ids=str)
def test_no_module_works_while_it_is_imported(path):
    for node in statements_run_at_import(tree_of(path)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).split(".")[-1]
            assert name not in WORK, f"{path}:{node.lineno} calls {name} at import; move it into a function"


@pytest.mark.parametrize("module", ["mmllm", "mmllm.cli"])
def test_the_command_starts_without_the_heavy_packages(module):
    if not any(module_of(path) == module for path in python_files("mmllm")):
        pytest.skip(f"{module} is not written yet")
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {name.split(".")[0] for name in done.stdout.split()} & HEAVY


def test_the_pinned_requirements_name_versions_and_no_place():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert {"torch==2.13.0", "torchvision==0.28.0"} <= set(pins), "torch and torchvision are pinned as a pair"
    assert [pin for pin in pins if not re.fullmatch(r"[a-z0-9.-]+==[\w.]+( ; [^@/]+)?", pin)] == []
