"""Where data files are, and where their rows begin: patterns, URLs, fingerprints, and the index of JSON."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmllm.config import SourceConfig
from mmllm.data.shards import ShardedFile
from mmllm.readers import index
from mmllm.readers.files import DataError, fingerprint, matching_files, parent_folder
from mmllm.readers.index import line_offsets, list_offsets
from mmllm.readers.rows import open_rows


def test_patterns_name_files_in_order(tmp_path: Path) -> None:
    for name in ("b-1.jsonl", "b-0.jsonl", "c.jsonl"):
        (tmp_path / name).write_text("{}")
    names = [str(tmp_path / name) for name in ("b-0.jsonl", "b-1.jsonl")]
    assert matching_files(str(tmp_path / "b-{0..1}.jsonl")) == names
    assert matching_files(str(tmp_path / "b-*.jsonl")) == names
    assert matching_files(str(tmp_path / "*.jsonl")) == [*names, str(tmp_path / "c.jsonl")]
    with pytest.raises(DataError, match=r"no data file at .*b-2.jsonl, of .*b-\{0\.\.2\}.jsonl; check `path`"):
        matching_files(str(tmp_path / "b-{0..2}.jsonl"))
    with pytest.raises(DataError, match=r"no data file at .*d-\*\.jsonl; check `path`"):
        matching_files(str(tmp_path / "d-*.jsonl"))


@pytest.mark.parametrize(("path", "folder"), [
    ("x.json", "."), ("/x.json", "/"), ("a/b/x.json", "a/b"), ("a/{b,c}/x.json", "a"), ("a/b-*/x-{0..3}.tar", "a"),
    ("*.json", "."), ("s3://a/b/x.json", "s3://a/b"), ("s3://a/b*/x.json", "s3://a"),
])  # fmt: skip
def test_image_paths_start_from_the_folder_of_all_files(path: str, folder: str) -> None:
    assert parent_folder(path) == folder


@pytest.mark.parametrize(("path", "text"), [
    ("s3://bucket/a.jsonl", "s3://bucket/a.jsonl needs a package that is not installed: Install s3fs"),
    ("xyz://a/b.jsonl", "xyz://a/b.jsonl is a URL that fsspec does not know: Protocol not known: xyz"),
    ("memory://nowhere/a.jsonl", "no data file at memory://nowhere/a.jsonl"),
    ("memory://nowhere/{0..3}.tar", "no data file at memory://nowhere/0.tar, of memory://nowhere/{0..3}.tar"),
])  # fmt: skip
def test_an_address_that_cannot_be_read_is_named_with_what_is_missing(path: str, text: str) -> None:
    for use in (open_rows, lambda path: ShardedFile(SourceConfig(path=path, streaming=True))):
        with pytest.raises(DataError) as caught:
            use(path)
        assert text in str(caught.value)


def test_a_fingerprint_tells_contents_apart_and_not_places(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    (tmp_path / "b").write_bytes(b"x" * 3_000_000)
    (tmp_path / "c").write_bytes(b"x" * 2_999_999 + b"y")
    first, same, other = (fingerprint([str(tmp_path / name)]) for name in "abc")
    assert first == same != other


# The index

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.sampled_from('ab",[]{}\\:\n ä'), max_size=8),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text('a"\\]', max_size=3), values, max_size=3),
    max_leaves=12,
)


def rows_at(data: bytes, offsets: tuple[np.ndarray, np.ndarray]) -> list[Any]:
    return [json.loads(data[start:end]) for start, end in zip(*offsets, strict=True)]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(JSON_VALUES, max_size=6),
    st.sampled_from([5, 16, 64, 1 << 20]),
    st.booleans(),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_the_index_finds_every_row_wherever_a_chunk_ends(
    rows: list[Any], size: int, is_ascii: bool, indent: int | None, has_mark: bool
) -> None:
    before, index.CHUNK_BYTES = index.CHUNK_BYTES, size
    try:
        mark = b"\xef\xbb\xbf" if has_mark else b""
        text = json.dumps(rows, ensure_ascii=is_ascii, indent=indent).encode()
        assert rows_at(mark + text, list_offsets(io.BytesIO(mark + text), "x")) == rows
        lines = mark + b"\r\n \n".join(json.dumps(row, ensure_ascii=is_ascii).encode() for row in rows)
        assert rows_at(lines, line_offsets(io.BytesIO(lines), "x")) == rows
    finally:
        index.CHUNK_BYTES = before
