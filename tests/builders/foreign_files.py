"""Rows and pictures as other programs write them, and what is read of them; with fixtures of the folder they lie in."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmllm.batch import Example
from mmllm.config import SourceConfig
from mmllm.data.check import DataReport, inspect_sources
from mmllm.data.inspection import RowRules
from mmllm.data.shards import ShardedFile
from mmllm.data.sources import load_pictures

NUM_ROWS = 3


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What is converted goes to a folder of the tests."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(NUM_ROWS):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    return tmp_path


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4 + number, 4), (60 * number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def rows(count: int = NUM_ROWS) -> list[dict[str, Any]]:
    return [
        {"id": str(number), "image": f"{number}.png", "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"ä, [picture] {{{number}}}"}]}
        for number in range(count)
    ]  # fmt: skip


def read(path: Path, **settings: Any) -> tuple[list[Example], DataReport]:
    found, report = inspect_sources([SourceConfig(path=str(path), **settings)], RowRules(None, 1, decode=True))
    return list(found), report


def stream(path: Path) -> list[Example]:
    file = ShardedFile(SourceConfig(path=str(path), streaming=True))
    shards = [one for shard in range(len(file.shards.names)) for one in file.shards.read(shard, 0)]
    return [load_pictures(file.lazy_example(read_row(), row)) for row, read_row in shards]


def said(examples: list[Example]) -> list[tuple[str, str, int]]:
    return [(example.id, example.messages[-1].text, len(example.images)) for example in examples]


def reasons(path: Path, **settings: Any) -> list[str]:
    report = read(path, **settings)[1]
    return report.unreadable + [bad.reason for bad in report.bad]
