"""Two runs never write into one folder, and one that was killed blocks nobody."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmllm.checkpoint.folder import load_checkpoint, read_manifest, save_checkpoint
from mmllm.feature_cache.files import FeatureFile, PictureHashes, has_locks
from mmllm.runs.lock import LOCK_FILE, LockedError, exclusive_run
from mmllm.stages.run import main
from tests.builders.tiny_runs import start_in_own_process, train_in_process

# The process says that it is in its third step, and stays there.
STAYS = """
import time
from mmllm.training import loop
whole_step = loop.Stepper.run_step
def step(self, number, data):
    if number == 2:
        (out / "is_there").touch()
        time.sleep(600)
    return whole_step(self, number, data)
loop.Stepper.run_step = step
"""


@pytest.fixture
def running(tiny_runs: Path, tmp_path: Path) -> Iterator[Any]:
    process = start_in_own_process(STAYS, tiny_runs / "stage2.yaml", tmp_path / "out", "data.num_workers=1")
    while not (tmp_path / "out" / "is_there").exists():
        process.join(0.05)
        assert process.exitcode is None
    yield process
    process.kill()
    process.join()


def test_a_second_run_in_a_folder_is_told_who_is_there_and_changes_nothing(
    tiny_runs: Path, tmp_path: Path, running: Any, capsys: Any
) -> None:
    out = tmp_path / "out"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as ended:
        main("stage2", [str(tiny_runs / "stage2.yaml"), f"out={out}"])
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        f"error: process {running.pid} on {socket.gethostname()} trains into {out} now; wait for it or stop it, or "
        "give another out=FOLDER\n"
    )
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_killed_run_blocks_nobody_though_its_workers_live_on(tiny_runs: Path, tmp_path: Path, running: Any) -> None:
    os.kill(running.pid, signal.SIGKILL)
    running.join()
    assert json.loads((tmp_path / "out" / LOCK_FILE).read_text())["pid"] == running.pid, "it is left behind"
    train_in_process(tiny_runs / "stage2.yaml", tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").is_file()
    assert not (tmp_path / "out" / LOCK_FILE).exists()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_trained_on_saved_to_and_cached_and_it_is_said(
    tiny_checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))  # as NFS, Lustre and file systems in user space answer

    model, processor, _ = load_checkpoint(tiny_checkpoint)
    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr("fcntl.lockf", refuse)
    with exclusive_run(tmp_path / "out"):
        assert "on a file system without locks" in capsys.readouterr().out
        save_checkpoint(tmp_path / "out", model, processor, card="a card")
    read_manifest(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.lock"))
    assert not has_locks(tmp_path)
    with FeatureFile(tmp_path, 0, 4).locked(wait=True) as is_mine:
        assert is_mine
    hashes = PictureHashes(tmp_path / "pictures.sqlite")  # at once: SQLite would try for a minute
    assert hashes.of([b"a picture"]) == [hashlib.sha256(b"a picture").hexdigest()]
    hashes.close()


def test_a_lock_is_let_go_when_a_run_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyError), exclusive_run(tmp_path):
        raise KeyError
    with exclusive_run(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text()) == {"pid": os.getpid(), "host": socket.gethostname()}
    assert list(tmp_path.iterdir()) == []


def test_who_holds_a_lock_that_says_nothing_is_another_process(tmp_path: Path, running: Any) -> None:
    (tmp_path / "out" / LOCK_FILE).write_text("")
    with pytest.raises(LockedError, match=r"^another process trains into"), exclusive_run(tmp_path / "out"):
        pass
