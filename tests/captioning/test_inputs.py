"""What a captioning job takes: folders, patterns, lists, tars, URLs; each picture is found and can be read."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from mmllm.captioning.inputs import FoundPicture, PictureInputs, read_picture
from mmllm.errors import MmllmError
from mmllm.images import load_image

COLOURS = {"a.png": "red", "b.png": "lime", "sub/c.png": "blue"}


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in COLOURS.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(png(colour))
    return tmp_path / "in"


def find(*inputs: object, **options: object) -> list[FoundPicture]:
    return list(PictureInputs([str(one) for one in inputs], **options))  # type: ignore[arg-type]


def colours(found: list[FoundPicture]) -> dict[str, str]:
    """{name: the colour of its picture, as read}."""
    of_rgb = {(255, 0, 0): "red", (0, 255, 0): "lime", (0, 0, 255): "blue"}
    pictures = {one.name: load_image(read_picture(one.place, one.origin)) for one in found if not one.unread}
    return {name: of_rgb[picture.getpixel((0, 0))] for name, picture in pictures.items()}


def test_a_folder_and_patterns_of_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert colours(find(folder)) == COLOURS
    assert set(colours(find(folder / "*.png"))) == {"a.png", "b.png"}
    assert set(colours(find(folder / "**" / "*.png"))) == {"a.png", "b.png", "c.png"}
    assert set(colours(find(folder / "{a,b}.png"))) == {"a.png", "b.png"}
    with pytest.raises(MmllmError, match="no file matches"):
        find(folder / "*.tiff")
    (folder / "really*.png").write_bytes(png("red"))
    assert [one.name for one in find(folder / "really*.png")] == ["really*.png"]
    monkeypatch.chdir(folder)
    assert [one.place for one in find("./a.png", "a.png")] == ["a.png"]


def test_of_two_folders_the_names_begin_with_theirs(folder: Path) -> None:
    assert {one.name for one in find(folder / "sub", folder / "a.png")} == {"sub/c.png", "a.png"}


def test_links_to_folders_are_not_followed(folder: Path) -> None:
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "link.png").symlink_to(folder / "a.png")
    (folder / "dangling.png").symlink_to(folder / "gone.png")
    assert {one.name for one in find(folder)} == {*COLOURS, "link.png", "dangling.png"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_rights_is_said(folder: Path) -> None:
    (folder / "sub").chmod(0)
    unread = [one.unread for one in find(folder) if one.unread]
    (folder / "sub").chmod(0o755)
    assert "sub cannot be searched (Permission denied)" in unread[0]


def write_list(path: Path, rows: list[dict[str, object]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_list_names_pictures_relative_to_itself_and_has_columns_for_the_prompt(folder: Path, suffix: str) -> None:
    rows: list[dict[str, object]] = [{"image": name, "tags": f"tag {colour}"} for name, colour in COLOURS.items()]
    path = write_list(folder / f"list{suffix}", [*rows, {"image": "gone.png", "tags": ""}, {"image": "", "tags": ""}])
    found = find(path, columns=["tags"])
    assert colours(found) == COLOURS
    assert {one.name: one.fields["tags"] for one in found if not one.unread} == {
        name: f"tag {colour}" for name, colour in COLOURS.items()
    }
    gone, empty = [one.unread for one in found if one.unread]
    assert f"row 3 of {path}: no image file at" in gone
    assert f"row 4 of {path}: it has no picture under image" in empty


def test_a_list_has_another_column_for_its_pictures(folder: Path) -> None:
    path = write_list(folder / "list.jsonl", [{"scan": "a.png", "image": "b.png"}, {"file_name": "b.png"}])
    assert [one.name for one in find(path)] == ["b.png", "b.png"]
    first, second = find(path, image_column="scan")
    assert first.name == "a.png"
    assert "it has no picture under scan; its columns: file_name; name the right one with --image-column" in (
        second.unread
    )


def test_a_table_may_hold_the_pictures_themselves(folder: Path) -> None:
    rows = [{"image": {"bytes": png(colour), "path": name}} for name, colour in COLOURS.items()]
    found = find(write_list(folder / "table.parquet", rows))
    assert list(colours(found).values()) == list(COLOURS.values())
    assert [one.place for one in found] == [f"{folder}/table.parquet/{number}" for number in range(3)]
    assert len({one.stat for one in found}) == 3


def write_tar(path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in {**{name: png(colour) for name, colour in COLOURS.items()}, "a.txt": b"x", "._a.png": b"x",
                           "n.mov": b"x"}.items():  # fmt: skip
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_a_tar_is_read_without_unpacking_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = write_tar(tmp_path / "shard.tar")
    inputs = PictureInputs([str(path)])
    found = list(inputs)
    assert colours(found) == COLOURS
    assert found[0].place == f"{path}/a.png"
    assert inputs.passed_over == {"no picture by its name (.mov)": 1}
    packed = tmp_path / "shard.tar.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert colours(find(packed)) == COLOURS
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(MmllmError, match="is not a tar that can be read to its end"):
        find(path)


def test_folders_files_and_tars_at_a_url(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    for name, colour in COLOURS.items():
        fs.pipe(f"/captions-in/{name}", png(colour))
    fs.pipe("/captions-in/shard.tar", write_tar(tmp_path / "shard.tar").read_bytes())
    try:
        assert colours(find("memory://captions-in")) == COLOURS
        assert colours(find("memory://captions-in/a.png")) == {"a.png": "red"}
        assert set(colours(find("memory://captions-in/*.png"))) == {"a.png", "b.png"}
        assert colours(find("memory://captions-in/shard.tar")) == COLOURS
        stats = {one.name: one.stat for one in find("memory://captions-in")}
        fs.pipe("/captions-in/a.png", png("blue") + b"longer")
        changed = {one.name for one in find("memory://captions-in") if one.stat != stats[one.name]}
        assert changed == {"a.png"}
    finally:
        fs.rm("/captions-in", recursive=True)


def test_an_unknown_url_is_said() -> None:
    with pytest.raises(MmllmError, match="nosuch://x"):
        find("nosuch://x")
