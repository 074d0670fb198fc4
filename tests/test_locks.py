"""Systems without the modules of Unix: Windows locks by `msvcrt`, and a Python with neither says that it cannot."""

from __future__ import annotations

import ast
import fcntl
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmllm.config import ConfigError
from mmllm.locks import _LOCKED_BYTE
from mmllm.training.memory import available_bytes
from tests.builders.tiny_runs import train_in_process

ROOT = Path(__file__).parent.parent
UNIX_ALONE = {"fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"}
WITHOUT_FCNTL = "import sys; sys.modules['fcntl'] = None; "
# What Windows documents of msvcrt.locking: from here on, so many bytes, of this process alone, or EACCES at once.
WITH_MSVCRT = """
import fcntl, os, sys, types
def locking(descriptor, mode, num_bytes):
    assert mode == msvcrt.LK_NBLCK
    lock(descriptor, LOCK_EX_NB, num_bytes, 0, os.SEEK_CUR)
lock, LOCK_EX_NB = fcntl.lockf, fcntl.LOCK_EX | fcntl.LOCK_NB
msvcrt = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
sys.modules.update(fcntl=None, msvcrt=msvcrt)
"""


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=250
    )


@pytest.mark.parametrize("package", ["mmllm", "projector", "demo", "train"])
def test_no_file_needs_a_module_of_unix_to_be_imported(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set[str]()
            names |= {str(node.module)} if isinstance(node, ast.ImportFrom) else set()
            assert not names & UNIX_ALONE, f"{path} imports {names & UNIX_ALONE}"


def test_without_fcntl_the_command_starts_and_locks_say_that_there_are_none(tmp_path: Path) -> None:
    code = """
import mmllm.locks
from mmllm.cli import main
with open(sys.argv.pop(), "ab") as file:
    print(mmllm.locks.lock_file(file, wait=True), mmllm.locks.lock_process(file.fileno()))
sys.argv[1:] = ["--help"]
main()
"""
    done = python(WITHOUT_FCNTL + code, tmp_path / "file")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("none none\n")
    assert "Trains LLaVA-style" in done.stdout


def test_without_file_locks_a_stage_trains_and_it_is_said(
    tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mmllm.locks._fcntl", None)  # what an import without it leaves
    out = tmp_path / "out"
    train_in_process(tiny_runs / "stage1.yaml", out, "data.cache_features=true", "optim.max_steps=2")
    assert (out / "manifest.json").is_file()
    assert f"this Python has no file locks: make sure that no second run writes to {out}" in capsys.readouterr().out


def test_a_plan_says_what_it_lacks_where_memory_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    with pytest.raises(ConfigError, match="measures memory as Linux and macOS report it"):
        available_bytes(torch.device("cpu"))


@pytest.mark.parametrize("function", ["lock_file(file)", "lock_process(file.fileno())"])
def test_windows_locks_hold_others_off_and_move_nothing_in_the_file(function: str, tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    path.write_bytes(b"a line\n")
    code = f"""{WITH_MSVCRT}
from pathlib import Path
from mmllm.locks import lock_file, lock_process
path = Path(sys.argv[1])
with path.open("a+b") as file:
    file.seek(2)
    print({function}, file.tell(), file.read(), flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(path)]
    with path.open("r+b") as mine:
        fcntl.lockf(mine, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _LOCKED_BYTE)
        assert python(code, path).stdout == "taken 2 b'line\\n'\n"
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held 2 b'line\\n'\n"
        with path.open("r+b") as mine, pytest.raises(BlockingIOError):
            fcntl.lockf(mine, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _LOCKED_BYTE)
        holder.stdin.close()
    assert path.read_bytes() == b"a line\n"
