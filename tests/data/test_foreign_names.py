"""Members of tars and paths of pictures, named as other systems name them."""

from __future__ import annotations

import io
import json
import os
import tarfile
import unicodedata
from pathlib import Path

import pytest

from tests.builders.foreign_files import datasets_cache, folder, png, read, reasons, said, stream

__all__ = ["datasets_cache", "folder"]  # fixtures

# Tars


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


FORK = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(50)
TEXT = json.dumps({"caption": "of both"}).encode()
TARS: dict[str, tuple[list[tuple[str, bytes]], list[tuple[str, str, int]]]] = {
    "./": ([("./a/0.png", png(0)), ("./a/0.txt", b"a"), ("./a/1.png", png(1)), ("./a/1.txt", b"b")],
           [("a/0", "a", 1), ("a/1", "b", 1)]),
    "a Mac": ([("._0.png", FORK), ("0.png", png(0)), ("__MACOSX/._0.png", FORK), ("._0.txt", FORK), ("0.txt", b"a"),
               (".DS_Store", b"x"), ("__MACOSX/0.png", FORK), ("./.DS_Store", b"x")], [("0", "a", 1)]),
    "dots in names": ([("cat.v2.jpg", png(0)), ("cat.v2.txt", b"a"), ("cat.v3.jpg", png(1)), ("cat.v3.txt", b"b"),
                       ("1.5.png", png(2)), ("1.5.txt", b"c")],
                      [("cat.v2", "a", 1), ("cat.v3", "b", 1), ("1.5", "c", 1)]),
    "WebDataset's own dots": ([("0.left.png", png(0)), ("0.right.png", png(1)), ("0.json", json.dumps({"messages": [
        {"role": "user", "content": "<image><image>?"}, {"role": "assistant", "content": "of both"}]}).encode())],
        [("0", "of both", 2)]),
    "endings": ([("0.JPG", png(0)), ("0.TXT", b"a"), ("1.WebP", png(1)), ("1.caption", b"b"), ("2.jpeg", png(2)),
                 ("2.json", TEXT)], [("0", "a", 1), ("1", "b", 1), ("2", "of both", 1)]),
    "dots in folders": ([("v1.0/0.png", png(0)), ("v1.0/0.txt", b"a")], [("v1.0/0", "a", 1)]),
    "notes": ([("__index__/0.png", b"x"), ("0.png", png(0)), ("0.txt", b"a"), ("README", b"x")], [("0", "a", 1)]),
}  # fmt: skip


@pytest.mark.parametrize("how", ["", ":gz", ":xz"])
@pytest.mark.parametrize("kind", TARS)
def test_tars_hold_the_same_samples_by_number_and_streamed(tmp_path: Path, kind: str, how: str) -> None:
    members, expected = TARS[kind]
    path = write_tar(tmp_path / f"x.tar{how.replace(':', '.')}", members, f"w{how}")
    examples, report = read(path)
    assert (report.unreadable, report.bad) == ([], [])
    assert said(examples) == said(stream(path)) == expected


def test_a_folder_in_a_tar_is_no_member_and_files_apart_have_a_reason(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / "x" / f"{number}.png").parent.mkdir(exist_ok=True)
        (tmp_path / "x" / f"{number}.png").write_bytes(png(number))
        (tmp_path / "x" / f"{number}.txt").write_text("a")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "x", ".", recursive=False)
        for name in ("0.png", "1.png", "0.txt", "1.txt"):
            tar.add(tmp_path / "x" / name, f"./{name}")
    found = reasons(tmp_path / "x.tar")
    assert "no .txt or .json with the picture 0" in found[0]
    assert "tar --sort=name" in found[0]


# Names


@pytest.mark.parametrize(("on_disk", "in_row"), [
    (unicodedata.normalize("NFD", "é à.png"), unicodedata.normalize("NFC", "é à.png")),
    (unicodedata.normalize("NFC", "é à.png"), unicodedata.normalize("NFD", "é à.png")),
    (b"caf\xe9.png", "café.png"),
    ("a b.png", "a%20b.png"),
    ("sub/a b.png", "sub\\a b.png"),
    ("sub/ü.png", ".\\sub\\u\u0308.png"),
    ("100%25.png", "100%25.png"),
    ("back\\slash.png", "back\\slash.png"),
])  # fmt: skip
def test_a_picture_is_found_however_its_name_was_written(tmp_path: Path, on_disk: str | bytes, in_row: str) -> None:
    path = os.path.join(os.fsencode(tmp_path), os.fsencode(on_disk))  # noqa: PTH118  # bytes
    os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
    with open(path, "wb") as file:  # noqa: PTH123
        file.write(png(0))
    (tmp_path / "x.json").write_text(json.dumps([{"image": in_row, "caption": "a"}]))
    examples, report = read(tmp_path / "x.json")
    assert (report.unreadable, report.bad) == ([], [])
    assert os.path.samefile(examples[0].images[0], path)  # noqa: PTH121


def test_a_name_that_two_files_could_have_is_left_out(tmp_path: Path) -> None:
    for form in ("NFC", "NFD"):
        (tmp_path / unicodedata.normalize(form, "é.png")).write_bytes(png(0))  # type: ignore[arg-type]
    (tmp_path / "x.json").write_text(json.dumps([{"image": ".\\e%CC%81.png", "caption": "a"}]))
    assert "it is not clear which is meant" in reasons(tmp_path / "x.json")[0]


def test_a_path_of_windows_says_what_to_write(folder: Path) -> None:
    (folder / "x.json").write_text(json.dumps([{"image": "C:\\data\\0.png", "caption": "a"}]))
    assert "a path of a Windows disk: write what follows that folder" in reasons(folder / "x.json")[0]
