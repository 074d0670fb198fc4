"""The file of a captioning ledger on full disks, on those without locks, and in place of other files."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmllm.captioning.ledger import Ledger
from mmllm.captioning.ledger_file import is_network_disk
from mmllm.errors import MmllmError
from tests.builders.caption_ledgers import SETTINGS, found, outcomes, states


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "a.ledger", may_create=True) as opened:
        yield opened


def test_a_full_disk_keeps_what_was_written(ledger: Ledger) -> None:
    ledger.add(found("ab"), SETTINGS, max_new_tokens=9)
    ledger.finish(outcomes(ledger.take(SETTINGS, 1)), SETTINGS)
    pages = ledger.database.execute("PRAGMA page_count").fetchone()[0]
    ledger.database.execute(f"PRAGMA max_page_count = {pages}")
    taken = ledger.take(SETTINGS, 1)
    with pytest.raises(OSError, match="No space left") as caught:
        ledger.finish(outcomes(taken, "long " * 100_000), SETTINGS)
    assert caught.value.errno == errno.ENOSPC  # which mmllm.errors explains
    assert states(ledger) == {"a": "done", "b": "taken"}


def test_what_is_no_ledger_is_said_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a shopping list, longer than a header of a database needs to be " * 99)
    with pytest.raises(MmllmError, match="is no ledger"):
        Ledger(tmp_path / "text", may_create=True)
    assert (tmp_path / "text").read_text().startswith("a shopping list")
    with sqlite3.connect(tmp_path / "other") as other:
        other.execute("CREATE TABLE birds (name)")
    with pytest.raises(MmllmError, match="a database of another program"):
        Ledger(tmp_path / "other", may_create=True)
    with pytest.raises(MmllmError, match="there is no ledger at"):
        Ledger(tmp_path / "gone")
    with pytest.raises(MmllmError, match="is a folder"):
        Ledger(tmp_path)
    with Ledger(tmp_path / "new", may_create=True) as ledger:
        ledger.database.execute("PRAGMA user_version = 99")
    with pytest.raises(MmllmError, match="has format 99, written by a newer mmllm"):
        Ledger(tmp_path / "new")


def test_a_disk_without_locks_has_a_journal_and_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")  # what NFS without its lock service answers

    monkeypatch.setattr("fcntl.flock", refuse)
    with Ledger(tmp_path / "a.ledger", may_create=True) as ledger:
        assert "on a file system without locks" in capsys.readouterr().out
        assert ledger.database.execute("PRAGMA journal_mode").fetchone()[0] == "truncate"
        ledger.add(found("a"), SETTINGS, max_new_tokens=9)
        ledger.finish(outcomes(ledger.take(SETTINGS, 1)), SETTINGS)
    with Ledger(tmp_path / "a.ledger") as ledger:
        assert states(ledger) == {"a": "done"}


def test_a_network_disk_is_known_by_its_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 0:21 / / rw - ext4 /dev/sda rw\n"
        "36 22 0:30 / /net/my\\040data rw,nosuid shared:1 - nfs4 server:/data rw\n"
        "37 22 0:31 / /home rw - ext4 /dev/sdb rw\n"
    )
    assert is_network_disk(Path("/net/my data/folder/a.ledger"), str(mounts))
    assert not is_network_disk(Path("/home/me/a.ledger"), str(mounts))
    assert not is_network_disk(Path("/a.ledger"), str(mounts))
    assert not is_network_disk(Path("/a.ledger"), str(tmp_path / "gone"))
