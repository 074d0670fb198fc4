"""The formats of a captioning job's output: whole, to train on without flagged captions, never over other files."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet
import pytest
from PIL import Image

from mmllm.captioning import outputs
from mmllm.captioning.inputs import FoundPicture, PictureInputs
from mmllm.captioning.ledger import JobSettings, Ledger, Outcome
from mmllm.captioning.outputs import FOLDER_FORMATS, FORMATS, TRAINING_FORMATS, write_output
from mmllm.config import SourceConfig
from mmllm.data.sources import read_source
from mmllm.errors import MmllmError

SETTINGS = JobSettings("model", "hash", "what <image>?")
NAMES = ("a.png", "a.jpg", "sub/b.png", "sub/bad.png")


def finish_all(ledger: Ledger, text: str = "a caption") -> None:
    outcomes = []
    for picture in ledger.take(SETTINGS, 99):
        flags = {"flags": ["refusal"]} if "bad" in picture.name else {}
        record = {
            "image": picture.place, "caption": f"{text}\nof {picture.name}", "model": "model", "model_hash": "hash",
            "prompt": "what <image>?", "finish": "end", "num_new_tokens": 3, "max_new_tokens": 9, **flags,
        }  # fmt: skip
        outcomes.append(Outcome(picture, f"bytes {picture.id}", None, record))
    ledger.finish(outcomes, SETTINGS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(NAMES):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (60 * number, 0, 0)).save(path)
    return tmp_path / "in"


@pytest.fixture
def ledger(folder: Path, tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "a.ledger", may_create=True) as opened:
        opened.add(PictureInputs([str(folder)]), SETTINGS, max_new_tokens=9)
        finish_all(opened)
        yield opened


def files_of(out: Path) -> dict[str, bytes]:
    paths = out.rglob("*") if out.is_dir() else [out]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths if path.is_file()}


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_format_holds_the_captions_and_is_written_again_the_same(
    ledger: Ledger, tmp_path: Path, output_format: str
) -> None:
    out = tmp_path / "out" / "it"
    write_output(ledger, out, output_format)
    first = files_of(out)
    assert out.is_dir() == (output_format in FOLDER_FORMATS)
    text = b"".join(first.values())
    if output_format == "parquet":
        text = str(pyarrow.parquet.read_table(out).to_pylist()).encode()
    for name in NAMES:
        is_kept = output_format not in TRAINING_FORMATS or "bad" not in name
        assert (f"of {name}".encode() in text) == is_kept, name
    write_output(ledger, out, output_format)
    assert {name: len(data) for name, data in files_of(out).items()} == {
        name: len(data) for name, data in first.items()
    }
    assert not list(out.parent.rglob("*.part"))


@pytest.mark.parametrize("output_format", sorted(set(FORMATS) - set(FOLDER_FORMATS)))
def test_a_file_of_something_else_is_never_overwritten(ledger: Ledger, tmp_path: Path, output_format: str) -> None:
    (tmp_path / "list").write_text("mine")
    with pytest.raises(MmllmError, match="was not written from"):
        write_output(ledger, tmp_path / "list", output_format)
    assert (tmp_path / "list").read_text() == "mine"
    with pytest.raises(MmllmError, match="is a folder or a device"):
        write_output(ledger, tmp_path, output_format)


@pytest.mark.parametrize("output_format", FOLDER_FORMATS)
def test_a_folder_format_wants_a_folder(ledger: Ledger, tmp_path: Path, output_format: str) -> None:
    (tmp_path / "list").write_text("mine")
    with pytest.raises(MmllmError, match="is a file; --format"):
        write_output(ledger, tmp_path / "list", output_format)


def test_an_unknown_format_is_said(ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(MmllmError, match="--format yaml is not known; allowed: jsonl, parquet"):
        write_output(ledger, tmp_path / "x", "yaml")


def test_sidecars_mirror_the_folders_and_leave_a_persons_files(ledger: Ledger, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    (out / "sub" / "b.txt").write_text("my own tags")
    remarks = write_output(ledger, out, "txt")
    # a.jpg comes before a.png, and both would be a.txt
    assert files_of(out) == {
        "a.txt": b"a caption of a.jpg\n",
        "a.png.txt": b"a caption of a.png\n",
        "sub/b.txt": b"my own tags",
    }
    assert any("1 files in" in remark and "longer names" in remark for remark in remarks)
    assert any("not of this job" in remark for remark in remarks)
    ledger.database.execute("UPDATE pictures SET state = 'waiting'")
    ledger.add([], SETTINGS, max_new_tokens=9)
    finish_all(ledger, "a new caption")
    write_output(ledger, out, "txt")
    assert files_of(out)["a.txt"] == b"a new caption of a.jpg\n"  # its own files it does replace


def test_names_that_lead_out_of_the_folder_stay_in_it(tmp_path: Path) -> None:
    with Ledger(tmp_path / "a.ledger", may_create=True) as ledger:
        found = [FoundPicture("x.tar/../../evil.png", "../../evil.png"), FoundPicture("x.tar//abs.png", "/abs.png")]
        ledger.add(found, SETTINGS, max_new_tokens=9)
        finish_all(ledger)
        write_output(ledger, tmp_path / "deep" / "out", "txt")
    assert set(files_of(tmp_path / "deep" / "out")) == {"evil.txt", "abs.txt"}


@pytest.mark.parametrize("output_format", ["jsonl", "parquet", "llava", "webdataset"])
def test_what_is_written_is_trained_on_as_it_is(ledger: Ledger, tmp_path: Path, output_format: str) -> None:
    endings = {"jsonl": ".jsonl", "parquet": ".parquet", "llava": ".json", "webdataset": ""}
    out = tmp_path / "elsewhere" / f"captions{endings[output_format]}"
    write_output(ledger, out, output_format)
    path = out / "000000.tar" if output_format == "webdataset" else out
    source = read_source(SourceConfig(path=str(path)))
    answers = sorted(example.messages[-1].text.replace("\n", " ") for example in source.examples)
    assert answers == ["a caption of a.jpg", "a caption of a.png", "a caption of sub/b.png"]
    assert all(len(example.images) == 1 for example in source.examples)
    reasons = [str(bad.reason) for bad in source.bad]
    assert len(reasons) == (output_format not in TRAINING_FORMATS)
    assert all("the caption was flagged" in reason for reason in reasons)


def test_parquet_has_a_column_for_each_key(ledger: Ledger, tmp_path: Path) -> None:
    write_output(ledger, tmp_path / "a.parquet", "parquet")
    rows = pyarrow.parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert [row["flags"] for row in rows] == [None, None, None, ["refusal"]]
    lines = [json.loads(row["record"]) for row in ledger.records(with_flagged=True)]
    assert [{key: value for key, value in row.items() if value is not None} for row in rows] == lines


def test_llava_has_a_conversation_for_each_caption_and_no_second_mark(ledger: Ledger, tmp_path: Path) -> None:
    record = json.loads(next(ledger.records(with_flagged=False))["record"])
    record["other_captions"] = ["another one"]
    ledger.database.execute("UPDATE pictures SET record = ? WHERE place = ?", (json.dumps(record), record["image"]))
    write_output(ledger, tmp_path / "llava.json", "llava")
    rows = json.loads((tmp_path / "llava.json").read_text())
    assert len(rows) == 4
    assert [row["conversations"][1]["value"] for row in rows[:2]] == ["a caption\nof a.jpg", "another one"]
    assert {row["conversations"][0]["value"] for row in rows} == {"<image>\nwhat ?"}
    assert len({row["id"] for row in rows}) == 4


def test_kohyas_metadata_has_absolute_paths(ledger: Ledger, folder: Path, tmp_path: Path) -> None:
    write_output(ledger, tmp_path / "meta.json", "kohya")
    metadata = json.loads((tmp_path / "meta.json").read_text())
    assert metadata[str(folder / "a.png")] == {"caption": "a caption\nof a.png"}
    assert all(Path(path).is_file() for path in metadata)


def test_tars_have_the_pictures_own_bytes_and_old_ones_go(
    ledger: Ledger, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "shards"
    monkeypatch.setattr(outputs, "PICTURES_A_TAR", 1)
    write_output(ledger, out, "webdataset")
    assert len(list(out.iterdir())) == 4  # the last one is empty
    with tarfile.open(out / "000000.tar") as tar:
        name = tar.getnames()[0]
        member = tar.extractfile(name)
        assert member is not None
        assert member.read() == (folder / "a.jpg").read_bytes()
    (folder / "a.png").unlink()
    monkeypatch.setattr(outputs, "PICTURES_A_TAR", 99)
    (remark,) = write_output(ledger, out, "webdataset")
    assert "1 pictures can no longer be read" in remark
    assert [path.name for path in out.iterdir()] == ["000000.tar"]
    (out / "000000.tar").rename(out / "000001.tar")
    write_output(ledger, out, "webdataset")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "000000.tar").write_text("mine")
    with pytest.raises(MmllmError, match="was not written from"):
        write_output(ledger, tmp_path / "others", "webdataset")
