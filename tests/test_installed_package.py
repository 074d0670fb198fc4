"""The wheel holds all that is needed to chat and to open the page, where there is no checkout."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import urllib.request
import zipfile
from pathlib import Path

import pytest

import mmllm
from tests.builders.page_driver import free_port

ROOT = Path(__file__).parent.parent
PACKAGES = ("demo", "mmllm", "projector")
# Where Python finds the packages; `bench` is in the checkout alone.
WHERE = """
from importlib.util import find_spec
print(*(find_spec(name).origin for name in ("demo.app", "mmllm.inference.engine", "projector")))
assert find_spec("bench") is None, "the checkout can be imported"
"""
MARK = ".of-the-installed-page { color: red }"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the project's own build backend, which needs no network."""
    out = tmp_path_factory.mktemp("wheel")
    code = f"import hatchling.build; hatchling.build.build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh folder in which the wheel is installed, and nothing else; its page's style has a mark."""
    target = tmp_path_factory.mktemp("installed") / "site"
    uv = [str(Path(sys.prefix) / "bin" / "uv"), "pip", "install", "--python", sys.executable, "--offline", "--quiet"]
    subprocess.run([*uv, "--no-deps", "--target", str(target), str(wheel)], check=True, capture_output=True, text=True)
    with (target / "demo" / "page.css").open("a") as file:
        file.write(f"\n{MARK}\n")
    return target


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A working directory outside the checkout, in which somebody has a `demo` of their own."""
    (tmp_path / "demo.py").write_text("raise SystemExit('not this one')\n")
    return tmp_path


def environment(installed: Path) -> dict[str, str]:
    """The installed folder first, then the packages it needs. With -S no .pth file leads to the checkout."""
    paths = [str(installed), sysconfig.get_paths()["purelib"]]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def python(installed: Path, folder: Path, *words: object) -> str:
    command = [sys.executable, "-S", "-P", *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=environment(installed), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_file_of_the_packages_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {*archive.namelist()}
    files = [path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    assert {str(file) for file in files if "__pycache__" not in file.parts} <= names
    assert {name.split("/")[0] for name in names} == {*PACKAGES, f"mmllm-{mmllm.__version__}.dist-info"}


def test_the_installed_packages_are_used_where_there_is_no_checkout(installed: Path, elsewhere: Path) -> None:
    files = python(installed, elsewhere, "-c", WHERE).split()
    assert [Path(file).relative_to(installed).parts[0] for file in files] == [*PACKAGES]


def test_the_installed_command_chats(installed: Path, elsewhere: Path, tiny_checkpoint: Path) -> None:
    command = [installed / "bin" / "mmllm", "chat", tiny_checkpoint, "--prompt", "hello", "--max-new-tokens", 3]
    assert json.loads(python(installed, elsewhere, *command, "--json"))["num_new_tokens"] <= 3


def test_the_installed_command_opens_the_page_with_its_own_files(
    installed: Path, elsewhere: Path, tiny_checkpoint: Path
) -> None:
    port = free_port()
    command = [sys.executable, "-S", "-P", str(installed / "bin" / "mmllm"), "demo", str(tiny_checkpoint)]
    with subprocess.Popen(
        [*command, "--port", str(port)], cwd=elsewhere, env=environment(installed), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as page:  # fmt: skip
        assert page.stdout is not None
        said: list[str] = []
        try:
            while not (said and "Ctrl-C" in said[-1]):
                said.append(page.stdout.readline())
                assert said[-1], said
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as answer:
                assert MARK in answer.read().decode()
        finally:
            os.killpg(page.pid, signal.SIGTERM)
