"""Folders as cameras, browsers, Macs and other systems leave them: pictures are found, and what is none is counted."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, features

from mmllm.captioning.inputs import PictureInputs
from mmllm.config import SourceConfig
from mmllm.data.sources import DataFile, read_source
from mmllm.images import ImageError, load_image
from mmllm.readers.files import RowError
from mmllm.readers.folders import HEIF_ENDINGS, PICTURE_ENDINGS, classify_files, describe_passed_over
from mmllm.readers.tars import PICTURE_SUFFIXES

APPLE_DOUBLE = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(50) + b"\xff\xfe"
WRITERS = {
    ".jpg": "JPEG", ".JPEG": "JPEG", ".jfif": "JPEG", ".jpe": "JPEG", ".mpo": "MPO", ".PNG": "PNG", ".webp": "WEBP",
    ".tif": "TIFF", ".TIFF": "TIFF", ".gif": "GIF", ".bmp": "BMP", ".jp2": "JPEG2000", ".ppm": "PPM", ".AVIF": "AVIF",
    ".HEIC": "HEIF", ".heif": "HEIF", ".hif": "HEIF",
}  # fmt: skip


def save(path: Path, kind: str) -> None:
    picture = Image.new("RGB", (40, 30), "red")
    if kind == "HEIF":
        import pillow_heif

        pillow_heif.from_pillow(picture).save(path)
    else:
        picture.save(path, kind)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of every ending with a caption beside it, and what lies about beside people's own files."""
    root = tmp_path_factory.mktemp("folder")
    for number, (ending, kind) in enumerate(WRITERS.items()):
        save(root / f"p{number}{ending}", kind)
        (root / f"p{number}.txt").write_text(f"caption {number}")
        (root / f"._p{number}{ending}").write_bytes(APPLE_DOUBLE)
        (root / f"._p{number}.txt").write_bytes(APPLE_DOUBLE)
    for name in ("__MACOSX/._a.jpg", ".hidden/b.jpg", "@eaDir/c.jpg", "$RECYCLE.BIN/d.jpg", ".DS_Store", "Thumbs.db",
                 "desktop.ini", "film.mov", "no_ending", "e.jxl", "f.cr2", "g.svg"):  # fmt: skip
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"\xff\x0a" + bytes(20))
    return root


def test_training_and_captioning_find_the_same_pictures_and_all_can_be_read(folder: Path) -> None:
    assert features.check("avif")
    source = read_source(SourceConfig(path=str(folder)))
    assert not source.bad
    names = {f"p{number}{ending}" for number, ending in enumerate(WRITERS)}
    assert {Path(str(example.images[0])).name for example in source.examples} == names
    found = [picture.place for picture in PictureInputs([str(folder)]) if not picture.unread]
    assert {Path(path).name for path in found} == names
    for path in found:
        assert load_image(path).size == (40, 30)
    assert {f".{suffix}" for suffix in PICTURE_SUFFIXES} == set(PICTURE_ENDINGS)  # of tars too


def test_what_is_passed_over_is_counted_by_reason_for_both(folder: Path) -> None:
    inputs, rows = PictureInputs([str(folder)]), DataFile(SourceConfig(path=str(folder)))
    unread = {picture.name: picture.unread for picture in inputs if picture.unread}
    told = describe_passed_over(rows.passed_over)
    kinds = (
        "without an ending",
        "(.mov)",
        "JPEG XL (.jxl)",
        "such as e.jxl",
        "a camera's raw file",
        "a drawing (.svg)",
    )
    for what in (f"{2 * len(WRITERS)} `._` files", "1 in __MACOSX", "1 hidden", "5 of the operating system", *kinds):
        assert what in told
    assert sum(inputs.passed_over.values()) + len(unread) == sum(rows.passed_over.values())
    assert sorted(unread) == ["e.jxl", "f.cr2", "g.svg"]
    assert all("convert it to PNG or JPEG" in reason for reason in unread.values())


def test_an_ending_that_needs_a_package_names_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pillow_heif" else find_spec(name))
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)  # as where it is not installed
    source = read_source(SourceConfig(path=str(folder)))
    num_heif = sum(ending.lower() in HEIF_ENDINGS for ending in WRITERS)
    assert (len(source.bad), len(source.examples)) == (num_heif, len(WRITERS) - num_heif)
    for row in source.bad:
        assert "pip install 'mmllm[heif]'" in row.reason
    with pytest.raises(ImageError, match=r"pip install 'mmllm\[heif\]'"):
        load_image(next(folder.glob("p*.HEIC")))
    for path in folder.glob("p*.AVIF"):  # Pillow's own
        load_image(path)


def test_a_caption_beside_a_picture_is_found_whatever_the_case_of_its_ending(tmp_path: Path) -> None:
    for name, text in (("a.jpg", "a.TXT"), ("b.tar.JPG", "b.tar.txt")):
        save(tmp_path / name, "JPEG")
        (tmp_path / text).write_text(f"of {name}")
    save(tmp_path / "c.jpg", "JPEG")
    (tmp_path / "c.JSON").write_text(json.dumps({"caption": "of c.jpg"}))
    source = read_source(SourceConfig(path=str(tmp_path)))
    assert [example.messages[-1].text for example in source.examples] == ["of a.jpg", "of b.tar.JPG", "of c.jpg"]


def test_a_folder_of_nothing_but_shadows_says_what_was_passed_over(tmp_path: Path) -> None:
    (tmp_path / "._a.jpg").write_bytes(APPLE_DOUBLE)
    with pytest.raises(ValueError, match=r"1 file passed over: 1 `\._` files"):
        DataFile(SourceConfig(path=str(tmp_path)))


@pytest.mark.parametrize("name", ["a/b/c.png", "._not_mac/c.png", "x__MACOSX/a.png", "dot.at.end./a.png", "a._b.png"])
def test_only_whole_names_are_passed_over(name: str) -> None:
    assert bool(classify_files([name]).pictures) == (not name.startswith("."))


@pytest.mark.parametrize(("record", "reason"), [
    ({"finish": "end"}, None),
    ({"finish": "length"}, "was cut off after 3 tokens"),
    ({"finish": "empty"}, "has no words"),
])  # fmt: skip
def test_a_caption_that_was_cut_off_is_no_answer_to_learn(
    tmp_path: Path, record: dict[str, Any], reason: str | None
) -> None:
    save(tmp_path / "a.png", "PNG")
    row = {"image": "a.png", "caption": "a red", "model": "m", "model_hash": "0", "prompt": "?", "num_new_tokens": 3}
    (tmp_path / "rows.jsonl").write_text(json.dumps({**row, **record}) + "\n")
    file = DataFile(SourceConfig(path=str(tmp_path / "rows.jsonl")))
    if reason is None:
        assert file.example(0).messages[-1].text == "a red"
    else:
        with pytest.raises(RowError, match=reason):
            file.example(0)
