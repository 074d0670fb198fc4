"""Rows of every kind of file, local or behind a URL, one by one or streamed: always the same examples."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from PIL import Image

from mmllm.batch import Example
from mmllm.config import SourceConfig
from mmllm.data import shards
from mmllm.data.check import inspect_sources
from mmllm.data.inspection import RowRules
from mmllm.data.shards import STREAM_FORMATS, ShardedFile
from mmllm.data.sources import read_source
from mmllm.images import load_image
from mmllm.readers.files import DataError, LazyImage
from mmllm.readers.rows import READERS, open_rows

NUM_ROWS = 7
Row = dict[str, Any]


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` converts goes to a folder of the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4 + number, 4), (30 * number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def caption(number: int) -> str:
    return f'A picture, number {number}: "ä, [b]"\\.'


def embedded_rows() -> list[Row]:
    texts = [[{"user": "What is it?", "assistant": caption(number)}] for number in range(NUM_ROWS)]
    return [
        {"id": str(number), "images": [{"bytes": png(number), "path": None}], "texts": texts[number]}
        for number in range(NUM_ROWS)
    ]


def path_rows(folder: Path) -> list[Row]:
    (folder / "pictures").mkdir()
    for number in range(NUM_ROWS):
        (folder / "pictures" / f"{number}.png").write_bytes(png(number))
    turns = [{"user": "What is it?", "assistant": ""}]
    return [
        {"id": str(number), "images": [f"pictures/{number}.png"], "texts": [{**turns[0], "assistant": caption(number)}]}
        for number in range(NUM_ROWS)
    ]


def write_json(folder: Path) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps(path_rows(folder), indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def write_jsonl(folder: Path) -> Path:
    path = folder / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, path_rows(folder))))
    return path


def write_parquet(folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "data.parquet"
    pq.write_table(pa.Table.from_pylist(embedded_rows()), path, row_group_size=3)
    return path


def dataset() -> Any:
    import datasets

    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
            "texts": [{"user": datasets.Value("string"), "assistant": datasets.Value("string")}],
        }
    )
    return datasets.Dataset.from_list(embedded_rows(), features=features)


def write_saved(folder: Path) -> Path:
    dataset().save_to_disk(folder / "saved")
    return folder / "saved"


def write_arrow(folder: Path) -> Path:
    return next(write_saved(folder).glob("*.arrow"))


def write_tar(folder: Path) -> Path:
    for number in range(NUM_ROWS):
        with tarfile.open(folder / f"data-{number // 3:03}.tar", "a") as tar:
            fields = json.dumps({"texts": [{"user": "What is it?", "assistant": caption(number)}]}).encode()
            for suffix, data in (("json", fields), ("png", png(number)), ("cls", b"3")):
                member = tarfile.TarInfo(f"sub/{number}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return folder / "data-{000..002}.tar"


def pictures(folder: Path) -> Path:
    folder = folder / "folder"
    folder.mkdir()
    for number in range(NUM_ROWS):
        (folder / f"{number}.png").write_bytes(png(number))
    return folder


def write_sidecars(folder: Path) -> Path:
    folder = pictures(folder)
    for number in range(NUM_ROWS):
        text, fields = folder / f"{number}.txt", {"texts": [{"user": "What is it?", "assistant": caption(number)}]}
        text.write_text(caption(number)) if number < 4 else text.with_suffix(".json").write_text(json.dumps(fields))
    return folder


def write_metadata_lines(folder: Path) -> Path:
    folder = pictures(folder)
    rows = [{"id": str(n), "file_name": f"{n}.png", "text": caption(n)} for n in range(NUM_ROWS)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def write_metadata_table(folder: Path) -> Path:
    import csv

    folder = pictures(folder)
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["id", "file_name", "text"], *([n, f"{n}.png", caption(n)] for n in range(NUM_ROWS))]
        )
    return folder


KINDS: dict[str, Callable[[Path], Path]] = {
    ".json": write_json,
    ".jsonl": write_jsonl,
    ".parquet": write_parquet,
    ".arrow": write_arrow,
    "save_to_disk": write_saved,
    ".tar": write_tar,
    "sidecars": write_sidecars,
    "metadata.jsonl": write_metadata_lines,
    ".csv": write_metadata_table,
}


def answers(examples: Any) -> list[tuple[str, str, tuple[int, int]]]:
    """Of each example its id, its answer and the size of its picture."""
    return [
        (example.id.removeprefix("sub/"), example.messages[-1].text, load_image(example.images[0]).size)
        for example in examples
    ]


EXPECTED = [(str(number), caption(number), (4 + number, 4)) for number in range(NUM_ROWS)]


def test_every_reader_is_tried() -> None:
    assert set(READERS) <= {*KINDS, ".tsv", ".feather"}  # which are CSV and Arrow


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_examples_in_any_order(tmp_path: Path, kind: str) -> None:
    source = read_source(SourceConfig(path=str(KINDS[kind](tmp_path))))
    assert source.bad == []
    assert answers(source.examples) == EXPECTED
    assert answers([source.examples[number] for number in (5, 0, -1)]) == [EXPECTED[n] for n in (5, 0, -1)]
    again = pickle.loads(pickle.dumps(source.examples))  # as a worker process gets it
    assert answers(again) == EXPECTED


@pytest.mark.parametrize("kind", [".parquet", ".arrow", "save_to_disk", ".tar"])
def test_pictures_inside_files_are_left_there_until_they_are_needed(tmp_path: Path, kind: str) -> None:
    rows = open_rows(str(KINDS[kind](tmp_path)))
    picture = rows[2]["images"][0]
    stored = picture["bytes"] if isinstance(picture, dict) else picture
    assert isinstance(stored, LazyImage)
    assert stored.load() == png(2)


@pytest.mark.parametrize("kind", [".json", ".jsonl", ".parquet", ".tar", "sidecars", "metadata.jsonl"])
def test_files_behind_a_url_are_read_as_local_ones(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # it switches off every URL, not the hub's alone
    path = KINDS[kind](tmp_path)
    memory = fsspec.filesystem("memory")
    root = f"/{tmp_path.name}"
    for file in tmp_path.rglob("*"):
        if file.is_file():
            memory.pipe_file(f"{root}/{file.relative_to(tmp_path)}", file.read_bytes())
    url = f"memory:/{root}/{path.relative_to(tmp_path)}"
    source = read_source(SourceConfig(path=url))
    assert source.bad == []
    assert answers(source.examples) == EXPECTED
    assert answers(read_source(SourceConfig(path=f"file://{path}")).examples) == EXPECTED


def streamed(path: str) -> list[Example]:
    from mmllm.data.sources import load_pictures

    file = ShardedFile(SourceConfig(path=path, streaming=True))
    rows = [one for shard in range(len(file.shards.names)) for one in file.shards.read(shard, 0)]
    return [load_pictures(file.lazy_example(read(), row)) for row, read in rows]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in STREAM_FORMATS])
def test_streamed_shards_hold_the_rows_of_the_index_and_can_be_entered_anywhere(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 300)
    monkeypatch.setattr(shards, "ROWS_PER_BATCH", 2)
    path = str(KINDS[kind](tmp_path))
    assert [answer[1:] for answer in answers(streamed(path))] == [answer[1:] for answer in EXPECTED]
    file = ShardedFile(SourceConfig(path=path, streaming=True))
    assert len(file.shards.names) > 1
    for shard in range(len(file.shards.names)):
        whole = [row for row, _ in file.shards.read(shard, 0)]
        assert whole == list(range(len(whole)))
        for start in whole:
            assert [row for row, _ in file.shards.read(shard, start)] == whole[start:]


def test_compressed_tars_are_read_by_number_too(tmp_path: Path) -> None:
    path = str(KINDS[".tar"](tmp_path)).replace("{000..002}", "000")
    packed = tmp_path / "data.tar.gz"
    import gzip

    packed.write_bytes(gzip.compress(Path(path).read_bytes()))
    assert len(streamed(str(packed))) == 3
    assert len(open_rows(str(packed))) == 3
    packed.rename(tmp_path / "packed.tar")  # what it holds decides, not its name
    assert len(open_rows(str(tmp_path / "packed.tar"))) == len(streamed(str(tmp_path / "packed.tar"))) == 3


def test_a_tar_caption_goes_before_the_one_of_its_metadata(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        fields = json.dumps({"caption": "other", "url": "https://x.org", "key": "0"}).encode()
        for suffix, data in (("jpg", png(1)), ("json", fields), ("txt", b" from the text \n")):
            member = tarfile.TarInfo(f"0.{suffix}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    (example,) = read_source(SourceConfig(path=str(tmp_path / "x.tar"), prompt="Say it.")).examples
    assert [message.text for message in example.messages] == ["\nSay it.", "from the text"]


def test_pictures_of_a_tar_keep_their_order_and_replace_the_names_of_its_json(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "<image><image><image>?"}, {"role": "assistant", "content": "Yes."}]
    fields = json.dumps({"id": "own", "images": ["x.png", "y.png", "z.png"], "messages": turns}).encode()
    members = (("2.png", png(2)), ("10.png", png(5)), ("json", fields), ("1.png", png(1)))
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for suffix, data in members:
            member = tarfile.TarInfo(f"a.{suffix}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    (example,) = read_source(SourceConfig(path=str(tmp_path / "x.tar"))).examples
    assert example.images == (png(2), png(5), png(1))
    assert streamed(str(tmp_path / "x.tar"))[0].images == example.images


def test_a_file_that_goes_away_ends_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path)
    examples = read_source(SourceConfig(path=str(path))).examples
    path.unlink()
    with pytest.raises(DataError, match=r"data\.jsonl row 2 can no longer be read: .*No such file"):
        examples[2]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_tar_that_is_cut_off_is_named_and_not_skipped(tmp_path: Path, num_processes: int) -> None:
    pattern = str(write_tar(tmp_path))
    second = tmp_path / "data-001.tar"
    second.write_bytes(second.read_bytes()[:1200])
    sources = [SourceConfig(path=pattern, streaming=True)]
    report = inspect_sources(sources, RowRules(None, 100), num_processes=num_processes)[1]
    assert [text.split(" is cut off")[0] for text in report.unreadable] == [str(second)]
    with pytest.raises(DataError, match="is cut off"):
        open_rows(str(second))


def test_a_picture_without_a_caption_is_a_bad_row(tmp_path: Path) -> None:
    folder = write_sidecars(tmp_path)
    (folder / "3.txt").unlink()
    source = read_source(SourceConfig(path=str(folder)))
    assert [(bad.row, bad.reason) for bad in source.bad] == [
        (3, "no 3.txt or 3.json beside 3.png, so there is nothing to learn about it")
    ]
    assert len(source.examples) == NUM_ROWS - 1


def test_rows_of_several_files_stand_one_behind_the_other(tmp_path: Path) -> None:
    for number in range(3):
        rows = [{"id": f"{number}-{row}"} for row in range(number + 1)]
        (tmp_path / f"{number}.json").write_text(json.dumps(rows))
    rows = open_rows(str(tmp_path / "*.json"))
    assert [rows[row]["id"] for row in range(len(rows))] == ["0-0", "1-0", "1-1", "2-0", "2-1", "2-2"]


@pytest.mark.parametrize(("name", "data", "text"), [
    ("a.parquet", b"PAR1 no more", "a.parquet cannot be read as parquet"),
    ("a.arrow", b"ARROW", "a.arrow cannot be read as an Arrow stream that `datasets` wrote"),
    ("a.tar", b"no tar.." * 128, "a.tar is not a tar that can be read to its end"),
])  # fmt: skip
def test_a_damaged_file_is_named(tmp_path: Path, name: str, data: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        open_rows(str(tmp_path / name))
    assert text in str(caught.value)


def test_a_folder_of_splits_asks_for_one(tmp_path: Path) -> None:
    import datasets

    datasets.DatasetDict({"train": dataset()}).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match=r"holds the splits train; give the folder of one, such as .*both/train"):
        open_rows(str(tmp_path / "both"))


def test_what_cannot_be_streamed_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be streamed: it has \.json; give files of one of \.jsonl, \.parquet"):
        ShardedFile(SourceConfig(path=str(write_json(tmp_path)), streaming=True))
