"""Data files as other programs and people write them: read as they are meant, or left out with a reason and a place."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.builders.foreign_files import NUM_ROWS, datasets_cache, folder, png, read, reasons, rows, said, stream

__all__ = ["datasets_cache", "folder"]  # fixtures

EXPECTED = [(str(number), f"ä, [picture] {{{number}}}", 1) for number in range(NUM_ROWS)]

# JSON

LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows())
LIST = json.dumps(rows(), ensure_ascii=False)
PRETTY = json.dumps(rows(), ensure_ascii=False, indent=2)
LAYOUTS: dict[str, tuple[str, bytes]] = {
    "a list in .jsonl": ("x.jsonl", LIST.encode()),
    "a pretty list in .jsonl": ("x.jsonl", PRETTY.encode()),
    "lines in .json": ("x.json", LINES.encode()),
    "one line in .json, of three": ("x.json", LINES.strip().encode()),
    "objects over several lines": ("x.jsonl", "\n".join(json.dumps(row, indent=2) for row in rows()).encode()),
    "objects over several lines, with commas": ("x.json", ",\n".join(json.dumps(r, indent=1) for r in rows()).encode()),
    "lines with commas": ("x.jsonl", ",\n".join(map(json.dumps, rows())).encode()),
    "a list under a key": ("x.json", json.dumps({"version": [1, 2], "info": {"n": [{}]}, "data": rows()}).encode()),
    "a pretty list under a key": ("x.json", json.dumps({"data": rows(), "by": "me"}, indent=4).encode()),
    "a list under a key in .jsonl": ("x.jsonl", json.dumps({"train": rows()}).encode()),
    "CRLF, blank lines": ("x.jsonl", b"\r\n" + LINES.replace("\n", "\r\n\r\n").encode() + b"\r\n\n"),
    "a mark and CRLF": ("x.json", b"\xef\xbb\xbf" + PRETTY.replace("\n", "\r\n").encode()),
    "a mark before lines": ("x.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
    "UTF-16": ("x.json", PRETTY.encode("utf-16")),
    "UTF-16 of big end": ("x.jsonl", b"\xfe\xff" + LINES.encode("utf-16-be")),
    "UTF-16 without a mark": ("x.json", LIST.encode("utf-16-le")),
    "gzip": ("x.jsonl.gz", gzip.compress(LINES.encode())),
    "gzip of a list": ("x.json.gz", gzip.compress(LIST.encode())),
    "gzip by another name": ("x.json", gzip.compress(LIST.encode())),
    "bzip2": ("x.jsonl.bz2", bz2.compress(LINES.encode())),
    "xz": ("x.jsonl.xz", lzma.compress(LINES.encode())),
    "zstandard": ("x.jsonl.zst", pa.Codec("zstd").compress(LINES.encode(), asbytes=True)),
    "gzip of UTF-16": ("x.json.gz", gzip.compress(LIST.encode("utf-16"))),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_json_is_read_in_every_layout_and_encoding_that_can_be_known(folder: Path, layout: str) -> None:
    name, data = LAYOUTS[layout]
    (folder / name).write_bytes(data)
    examples, report = read(folder / name)
    assert (report.unreadable, report.bad) == ([], [])
    assert said(examples) == EXPECTED


@pytest.mark.parametrize("layout", ["gzip", "bzip2", "xz", "zstandard", "a mark before lines", "CRLF, blank lines"])
def test_compressed_lines_are_streamed_without_a_copy(folder: Path, layout: str) -> None:
    name, data = LAYOUTS[layout]
    (folder / name).write_bytes(data)
    assert said(stream(folder / name)) == EXPECTED


@pytest.mark.parametrize(
    "layout", ["UTF-16", "a list in .jsonl", "a pretty list in .jsonl", "objects over several lines"]
)
def test_json_that_is_not_in_lines_is_not_streamed_and_says_so(folder: Path, layout: str) -> None:
    (folder / "x.jsonl").write_bytes(LAYOUTS[layout][1])
    (reason,) = reasons(folder / "x.jsonl", streaming=True)
    assert "x.jsonl cannot be streamed, because it" in reason


def test_a_copy_follows_the_file_that_it_was_made_of(folder: Path) -> None:
    path = folder / "x.jsonl.gz"
    for count in (3, 1, 2):
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows(count)).encode()))
        assert len(read(path)[0]) == count


def test_one_row_alone_is_a_row_in_every_layout(folder: Path) -> None:
    (row,) = rows(1)
    for text in (json.dumps(row), json.dumps(row, indent=1), json.dumps([row])):
        for name in ("x.json", "x.jsonl"):
            (folder / name).write_text(text)
            assert said(read(folder / name)[0]) == EXPECTED[:1]


@pytest.mark.parametrize(("name", "data", "words"), [
    ("x.json", PRETTY.replace('"\n      }\n    ]\n  }\n]', '"\n      }\n    ]\n  },\n]').encode(),
     ["a value is missing before a comma or a bracket in line", "remove the comma"]),
    ("x.json", PRETTY.replace('"0.png",', '"0.png",,').encode(), ["not JSON at line 4, column", "has no comma before"]),
    ("x.jsonl", LINES.replace('"1.png"', "'1.png'").encode(), ["not JSON at line 2, column", "double quotes"]),
    ("x.jsonl", LINES.encode("cp1252"), ["is not UTF-8 text at byte", "(line 1)", "iconv -f cp1252"]),
    ("x.json", b'{"images": [{"id": 1}], "annotations": [{"id": 1}]}', ["lists under images, annotations"]),
    ("x.json", PRETTY[:-40].encode(), ["never closed", "cut off"]),
    ("x.jsonl.gz", gzip.compress(LINES.encode() * 50)[:-20], ["x.jsonl.gz", "damaged or cut off"]),
    ("x.json", b'"text"', ["must hold a list of rows", "got a string"]),
    ("x.parquet", b"PAR1 and no more", ["x.parquet cannot be read as parquet"]),
    ("x.csv", "image,caption\n0.png,a\n1.png,gr\xfcn\n".encode("cp1252"), ["x.csv", "line 3", "CSV UTF-8"]),
    ("x.csv", b"image,caption\n", ["x.csv holds no rows"]),
    ("x.csv", b"", ["x.csv holds no rows"]),
    ("x.csv", b"image,caption\n0.png,a\n1.png,b,c,d\n", ["x.csv cannot be read as csv"]),
])  # fmt: skip
def test_what_cannot_be_read_names_the_place_and_what_to_do(
    folder: Path, name: str, data: bytes, words: list[str]
) -> None:
    (folder / name).write_bytes(data)
    found = "\n".join(reasons(folder / name))
    assert [word for word in words if word not in found] == []


def test_numbers_that_are_none_say_nothing(folder: Path) -> None:
    (folder / "x.jsonl").write_text(LINES.replace('"id": "0"', '"id": NaN, "score": -Infinity'))
    assert [example.id for example in read(folder / "x.jsonl")[0]] == ["#0", "1", "2"]


# CSV

WORDS = ["007", "1e3", "NA", "True", "null", "None", "nan", "2024-01-01", "-"]


@pytest.mark.parametrize(("name", "comma", "encoding"), [
    ("x.csv", ",", "utf-8"), ("x.csv", ";", "utf-8-sig"), ("x.tsv", "\t", "utf-8"), ("x.csv", "\t", "utf-16"),
])  # fmt: skip
def test_every_value_of_a_csv_is_the_word_that_it_is(folder: Path, name: str, comma: str, encoding: str) -> None:
    lines = [comma.join(["", "id", "image", "caption", "text"])]
    lines += [comma.join([str(n), word, f"{n % 3}.png", word, ""]) for n, word in enumerate(WORDS)]
    lines += [comma.join(["9", "last", "0.png", '"two\r\nlines, ""ä"""', ""])]
    (folder / name).write_bytes("\r\n".join(lines).encode(encoding))
    examples, report = read(folder / name)
    assert (report.unreadable, report.bad) == ([], [])
    assert [(example.id, example.messages[-1].text) for example in examples] == [
        *zip(WORDS, WORDS, strict=True), ("last", 'two\r\nlines, "ä"'),
    ]  # fmt: skip


def test_a_csv_has_conversations_as_json(folder: Path) -> None:
    import csv

    with (folder / "x.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "image", "conversations"])
        for row in rows():
            table.writerow([row["id"], row["image"], json.dumps(row["conversations"])])
        table.writerow(["python", "0.png", str(rows()[0]["conversations"])])
    examples, report = read(folder / "x.csv")
    assert said(examples) == EXPECTED
    assert [bad.reason for bad in report.bad] == [
        "conversations is a list as Python prints it; write it with json.dumps"
    ]


# Tables of other tools


def columns(kind: str) -> dict[str, Any]:
    """Three rows as a table has them."""
    talks = [row["conversations"] for row in rows()]
    pictures = [png(number) for number in range(NUM_ROWS)]
    ids = [str(number) for number in range(NUM_ROWS)]
    captions = [answer for _, answer, _ in EXPECTED]
    turn = pa.struct([("from", pa.string()), ("value", pa.string())])
    base = {
        "id": pa.array(ids),
        "image": pa.array(pictures, pa.binary()),
        "conversations": pa.array(talks, pa.list_(turn)),
    }
    maps = pa.list_(pa.map_(pa.string(), pa.string()))
    structs = [{"bytes": picture, "path": f"{n}.png"} for n, picture in enumerate(pictures)]
    messages = [
        [{"role": "user", "content": [{"type": "image", "index": 0, "text": None},
                                      {"type": "text", "index": None, "text": "What is it?"}]},
         {"role": "assistant", "content": [{"type": "text", "index": None, "text": caption}]}]
        for caption in captions
    ]  # fmt: skip
    tables: dict[str, dict[str, Any]] = {
        "large types": {**base, "id": pa.array(ids, pa.large_string()), "image": pa.array(pictures, pa.large_binary())},
        "views": {**base, "id": pa.array(ids, pa.string_view()), "image": pa.array(pictures, pa.binary_view())},
        "categories": {**base, "id": pa.array(ids).dictionary_encode(),
                       "image": pa.array([f"{n}.png" for n in range(NUM_ROWS)]).dictionary_encode()},
        "uint8 lists": {**base, "image": pa.array([list(one) for one in pictures], pa.list_(pa.uint8()))},
        "int64 lists": {**base, "image": pa.array([list(one) for one in pictures], pa.list_(pa.int64()))},
        "maps": {**base, "conversations": pa.array([[list(t.items()) for t in talk] for talk in talks], maps)},
        "a list of structs": {**base, "image": pa.array([[one] for one in structs])},
        "JSON as text": {**base, "conversations": pa.array(list(map(json.dumps, talks)))},
        "JSON as bytes": {**base, "conversations": pa.array([json.dumps(talk).encode() for talk in talks])},
        "lists under columns": {**base, "conversations": pa.array(
            [{"from": [t["from"] for t in talk], "value": [t["value"] for t in talk]} for talk in talks])},
        "a tar's columns": {"__key__": pa.array(ids), "jpg": pa.array(structs), "txt": pa.array(captions)},
        "a tar's columns, JSON": {"__key__": pa.array(ids), "__url__": pa.array(["x.tar"] * NUM_ROWS),
                                  "png": pa.array(pictures),
                                  "json": pa.array([json.dumps({"conversations": talk}) for talk in talks])},
        "a picture and a caption": {"id": pa.array(ids), "jpg": pa.array(pictures), "caption": pa.array(captions)},
        "float ids": {**base, "id": pa.array([0.0, 1.0, 2.0])},
        "byte ids": {**base, "id": pa.array([one.encode() for one in ids])},
        "an index": {**base, "__index_level_0__": pa.array([5, 6, 7])},
        "null beside": {**base, "extra": pa.nulls(NUM_ROWS), "system": pa.nulls(NUM_ROWS, pa.string()),
                        "images": pa.array([[], None, []], pa.list_(pa.string()))},
        "a union of parts": {"id": pa.array(ids), "images": pa.array([[one] for one in structs]),
                             "messages": pa.array(messages)},
    }  # fmt: skip
    return tables[kind]


TABLES = (
    "large types", "views", "categories", "uint8 lists", "int64 lists", "maps", "a list of structs", "JSON as text",
    "JSON as bytes", "lists under columns", "a tar's columns", "a tar's columns, JSON", "a picture and a caption",
    "float ids", "byte ids", "an index", "null beside", "a union of parts",
)  # fmt: skip


@pytest.mark.parametrize("kind", TABLES)
def test_parquet_of_other_tools_is_read_by_number_and_streamed(folder: Path, kind: str) -> None:
    pq.write_table(pa.table(columns(kind)), folder / "x.parquet", row_group_size=2)
    examples, report = read(folder / "x.parquet")
    assert (report.unreadable, report.bad) == ([], [])
    assert said(examples) == EXPECTED
    assert said(stream(folder / "x.parquet")) == EXPECTED
    assert not report.unread


def test_dates_are_harmless_and_text_that_is_none_has_a_reason(folder: Path) -> None:
    old = pa.array([-(10**15)] * NUM_ROWS, pa.timestamp("s"))
    captions = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"gr\xfcn", b"c"]).buffers())
    times = {"when": old, "took": pa.array([10**15] * NUM_ROWS, pa.duration("s"))}
    pq.write_table(
        pa.table({"image": [f"{n}.png" for n in range(NUM_ROWS)], "caption": captions, **times}), folder / "x.parquet"
    )
    examples, report = read(folder / "x.parquet")
    assert [example.messages[-1].text for example in examples] == ["a", "c"]
    assert "row 1 caption is not UTF-8 text at byte 2" in report.bad[0].reason


def test_a_picture_as_an_array_of_pixels_has_a_reason(folder: Path) -> None:
    pixels = [[[[0, 0, 0]] * 4] * 4] * NUM_ROWS
    pq.write_table(pa.table({"image": pixels, "caption": ["a", "b", "c"]}), folder / "x.parquet")
    assert "array of pixels; write the bytes of a PNG file" in reasons(folder / "x.parquet")[0]


def test_files_with_other_columns_are_named(folder: Path) -> None:
    pq.write_table(pa.table({"image": ["0.png"], "caption": ["a"]}), folder / "a.parquet")
    pq.write_table(pa.table({"image": ["0.png"], "title": ["a"]}), folder / "b.parquet")
    (reason,) = reasons(folder / "*.parquet")
    assert "b.parquet has other columns than" in reason
    assert "(caption, title)" in reason


@pytest.mark.parametrize("kind", ["large types", "views", "categories", "maps"])
def test_arrow_files_of_other_tools_are_read(folder: Path, kind: str) -> None:
    table = pa.table(columns(kind))
    with pa.ipc.new_file(str(folder / "x.feather"), table.schema) as file:
        file.write_table(table, max_chunksize=2)
    examples, report = read(folder / "x.feather")
    assert (report.unreadable, report.bad) == ([], [])
    assert said(examples) == EXPECTED
