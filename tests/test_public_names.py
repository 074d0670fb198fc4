"""What a program may use of the package: ten names and a few, each with an example that runs, imported when used."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import mmllm

ROOT = Path(__file__).parent.parent
NAMES = sorted({*mmllm.__all__} - {"__version__"})
EXAMPLE = re.compile(r"Example:\n(.*)", re.DOTALL)
MODEL, PICTURES = "runs/tiny/stage2", "data/scenes/val/images"


def example_of(name: str) -> str:
    found = EXAMPLE.search(inspect.getdoc(getattr(mmllm, name)) or "")
    assert found, f"mmllm.{name} has no example in its docstring"
    return textwrap.dedent(found[1])


def python_of_readme() -> str:
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    return str(block)


@pytest.fixture
def checkout(
    tiny_checkpoint: Path, tiny_scenes: Path, tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A working directory that looks like a checkout after `make demo`, with the model and the run of the tests."""
    (tmp_path / MODEL).parent.mkdir(parents=True)
    (tmp_path / MODEL).symlink_to(tiny_checkpoint)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "scenes").symlink_to(tiny_scenes)
    (tmp_path / "configs" / "tiny").mkdir(parents=True)
    shutil.copy(tiny_runs / "stage1.yaml", tmp_path / "configs" / "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_has_an_example_that_runs(name: str, checkout: Path) -> None:
    assert "import mmllm" in example_of(name)
    exec(compile(example_of(name), f"the example of {name}", "exec"), {})


def test_the_example_of_the_readme_runs_and_uses_public_names_alone(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = python_of_readme()
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
    tree = ast.parse(code)
    imported = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imported == ["import mmllm"]
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "mmllm"}
    assert used <= {*NAMES}


def test_captions_are_those_of_the_inputs_and_a_second_call_makes_none_anew(checkout: Path) -> None:
    first = mmllm.caption(MODEL, [f"{PICTURES}/000001.png"], "captions.jsonl", max_new_tokens=4)
    every = mmllm.caption(MODEL, PICTURES, "captions.jsonl", max_new_tokens=4)
    lines = Path("captions.jsonl").read_text().splitlines()
    assert len(every) == len(lines) == len(list(Path(PICTURES).glob("*.png")))
    assert mmllm.caption(MODEL, [f"{PICTURES}/000001.png"], "captions.jsonl", max_new_tokens=4) == first
    assert first.items() < every.items()
    assert Path("captions.jsonl").read_text().splitlines() == lines


def test_a_question_is_asked_as_a_conversation_asks_it(checkout: Path) -> None:
    model, picture = mmllm.load(MODEL), Path(PICTURES) / "000002.png"
    sampling = mmllm.Sampling(max_new_tokens=6)
    example = mmllm.Conversation(label=model.picture_label).ask("What is it?", [str(picture), picture.read_bytes()])
    reply = model.ask("What is it?", [picture, picture.read_bytes()], sampling)
    assert reply.text == model.reply(example, sampling).text
    assert reply.num_image_tokens > 0


def test_a_mistake_is_an_error_of_mmllm_and_ends_no_process(checkout: Path) -> None:
    for call in (
        lambda: mmllm.load("nothing/here"),
        lambda: mmllm.train("configs/tiny/stage1.yaml", ["optim.max_stepz=4"]),
        lambda: mmllm.train("configs/tiny/stage1.yaml", "optim.max_steps=4"),
        lambda: mmllm.evaluate(MODEL, "no-such-task"),
        lambda: mmllm.caption(MODEL, "configs", "captions.jsonl"),
        lambda: mmllm.load_config("configs/none.yaml"),
    ):
        with pytest.raises(mmllm.MmllmError):
            call()


def test_names_are_found_by_dir_and_by_star_and_others_are_refused() -> None:
    assert {*mmllm.__all__} <= {*dir(mmllm)}
    space: dict[str, object] = {}
    exec("from mmllm import *", space)
    assert {*mmllm.__all__} <= {*space}
    with pytest.raises(AttributeError, match=r"no attribute 'chatt'; public are .*load_config"):
        _ = mmllm.chatt


def test_type_checkers_see_the_objects_that_programs_get() -> None:
    tree = ast.parse(Path(mmllm.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    told = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert told == mmllm._HOMES
    assert sorted(told) == NAMES


def test_importing_the_package_imports_nothing_else_of_it() -> None:
    code = "import sys; before = {*sys.modules}; import mmllm; dir(mmllm); print(*{*sys.modules} - before)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {*done.stdout.split()}
    assert {name for name in loaded if name.split(".")[0] not in sys.stdlib_module_names} == {"mmllm"}
