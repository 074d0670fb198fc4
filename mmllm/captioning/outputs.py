"""The files that a ledger is written to, whole or not at all: `--format`. Those to train on have no flagged captions.

jsonl, parquet, json   all captions with their flags; json is a file for each picture
txt                    a text file for each picture, in folders as those of the pictures
llava                  conversations in LLaVA's format, which stage 1 trains on
kohya                  the metadata of sd-scripts, https://github.com/kohya-ss/sd-scripts (--in_json)
webdataset             tars with the pictures and their captions
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mmllm.captioning import json_lines
from mmllm.captioning.inputs import read_picture
from mmllm.captioning.ledger import Ledger, from_sql
from mmllm.disk import replaced_file
from mmllm.errors import MmllmError
from mmllm.readers.folders import PICTURE_ENDINGS, ending_of

ROWS_AT_ONCE = 1000  # of a parquet row group
PICTURES_A_TAR = 10_000


def write_output(ledger: Ledger, out: Path, output_format: str) -> list[str]:
    """Writes the captions of a ledger; returns what is to be said about it. Raises MmllmError."""
    check_output(out, output_format)
    if output_format in FOLDER_FORMATS:
        return FORMATS[output_format](ledger, out) or []
    require_ours(ledger, out)
    remarks = FORMATS[output_format](ledger, out) or []
    if output_format != "jsonl":
        ledger.note_written(out)
    return remarks


def require_free(ledger: Ledger, out: Path, output_format: str) -> None:
    """Raises MmllmError where writing this output, at the end of a job, would overwrite what is not of this ledger."""
    if output_format == "webdataset":
        for path in out.glob("*.tar"):
            require_ours(ledger, path)
    elif output_format not in ("jsonl", *FOLDER_FORMATS):  # lines are taken in, sidecars are looked at one by one
        require_ours(ledger, out)


def require_ours(ledger: Ledger, path: Path) -> None:
    """Raises MmllmError for a file that exists and was not written from this ledger: it is never overwritten."""
    if path.exists() and ledger.written_file(path) is None:
        raise MmllmError(f"{path} exists, and was not written from {ledger.path}; name another --out")


def check_output(out: Path, output_format: str) -> None:
    """Raises MmllmError where this path cannot be written in this format."""
    if output_format not in FORMATS:
        raise MmllmError(f"--format {output_format} is not known; allowed: {', '.join(FORMATS)}")
    if output_format in FOLDER_FORMATS:
        if out.exists() and not out.is_dir():
            raise MmllmError(f"--out {out} is a file; --format {output_format} writes a folder, so name one")
    elif out.exists() and not out.is_file():
        raise MmllmError(f"--out {out} is a folder or a device; give the path of a file")


def export_captions(ledger: Ledger, out: Path, output_format: str) -> list[str]:
    """As `write_output`, for a command: it also says how many captions there are. Raises MmllmError."""
    num_all = ledger.database.execute("SELECT count(*) FROM pictures WHERE record IS NOT NULL").fetchone()[0]
    if not num_all:
        raise MmllmError(f"{ledger.path} holds no captions yet")
    num_flagged = ledger.database.execute("SELECT count(*) FROM pictures WHERE flags IS NOT NULL").fetchone()[0]
    if output_format == "jsonl" and out.exists():
        raise MmllmError(
            f"{out} exists; name a new file, or run `mmllm caption` to bring a job's own output up to date"
        )
    remarks = write_output(ledger, out, output_format)
    left_out = f", without {num_flagged:,} flagged" if num_flagged and output_format in TRAINING_FORMATS else ""
    return [f"{num_all:,} captions of {ledger.path}{left_out} in {out}", *remarks]


def _records(ledger: Ledger, *, with_flagged: bool) -> Iterator[dict[str, Any]]:
    return (json.loads(row["record"]) for row in ledger.records(with_flagged=with_flagged))


def _write_parquet(ledger: Ledger, out: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    texts, numbers = (
        ("image", "caption", "model", "model_hash", "prompt", "finish"),
        ("num_new_tokens", "max_new_tokens"),
    )
    lists = ("other_captions", "flags")
    schema = pa.schema(
        [
            *((name, pa.string()) for name in texts),
            *((name, pa.int64()) for name in numbers),
            *((name, pa.list_(pa.string())) for name in lists),
        ]
    )
    with replaced_file(out) as file, pa.parquet.ParquetWriter(file, schema) as writer:
        for chunk in _chunks(_records(ledger, with_flagged=True), ROWS_AT_ONCE):
            writer.write_table(pa.Table.from_pylist(chunk, schema))


def _chunks(records: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    chunk: list[dict[str, Any]] = []
    for record in records:
        chunk.append(record)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _write_sidecars(ledger: Ledger, out: Path, ending: str) -> list[str]:
    """A file for each picture. Two pictures that would have the same file get one that their whole name is in."""
    ledger.database.execute("CREATE TEMP TABLE IF NOT EXISTS sidecars (name PRIMARY KEY) WITHOUT ROWID")
    ledger.database.execute("DELETE FROM sidecars")
    num_longer = num_kept = 0
    for row in ledger.records(with_flagged=ending == ".json"):
        name, whole = (_inside(from_sql(row[column])) for column in ("name", "place"))
        stem = name[: -len(ending_of(name))] if ending_of(name) else name
        for number, candidate in enumerate((stem, name, whole)):
            values = (os.fsencode(candidate),)
            if ledger.database.execute("INSERT OR IGNORE INTO sidecars VALUES (?)", values).rowcount:
                num_longer += number > 0
                num_kept += not _write_sidecar(ledger, out / f"{candidate}{ending}", json.loads(row["record"]), ending)
                break
    remarks = []
    if num_longer:
        remarks.append(f"{num_longer} files in {out} have longer names, since several pictures share the short one")
    if num_kept:
        remarks.append(
            f"{num_kept} files in {out} are not of this job, and stay as they are; their captions are missing"
        )
    return remarks


def _inside(name: str) -> str:
    """A relative path that does not leave its folder, as names in a tar may."""
    parts = name.replace("://", "/").split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))


def _write_sidecar(ledger: Ledger, path: Path, record: dict[str, Any], ending: str) -> bool:
    """False where there is another file of that name, which is not overwritten."""
    texts = [record["caption"], *record.get("other_captions", [])]
    text = json.dumps(record) if ending == ".json" else "\n".join(" ".join(one.split()) for one in texts)
    data = f"{text}\n".encode()
    if path.is_file() and path.read_bytes() == data:
        return True
    if path.exists() and ledger.written_file(path) is None:
        return False
    ledger.note_written(path)
    with replaced_file(path) as file:
        file.write(data)
    return True


def _write_array(out: Path, entries: Iterable[str], brackets: str) -> None:
    with replaced_file(out) as file:
        file.write(brackets[0].encode())
        for number, entry in enumerate(entries):
            file.write((",\n" if number else "\n").encode() + entry.encode())
        file.write(f"\n{brackets[1]}\n".encode())


def _write_llava(ledger: Ledger, out: Path) -> list[str]:
    """One conversation for each caption, with paths relative to the file's own folder."""
    num_inside = 0

    def entries() -> Iterator[str]:
        nonlocal num_inside
        folder = out.absolute().parent
        for row in ledger.records(with_flagged=False):
            if row["origin"]:
                num_inside += 1
                continue
            record = json.loads(row["record"])
            image = os.path.relpath(Path(record["image"]).absolute(), folder)
            for number, text in enumerate([record["caption"], *record.get("other_captions", [])]):
                question = {"from": "human", "value": f"<image>\n{record['prompt'].replace('<image>', '')}"}
                turns = [question, {"from": "gpt", "value": text}]
                marked = f"{record['image']}#{number}" if number else record["image"]
                yield json.dumps({"id": marked, "image": image, "conversations": turns})

    _write_array(out, entries(), "[]")
    return _left_out(num_inside, out)


def _write_kohya(ledger: Ledger, out: Path) -> list[str]:
    """`{"<absolute path>": {"caption"}}`, which sd-scripts calls metadata with full paths."""
    num_inside = 0

    def entries() -> Iterator[str]:
        nonlocal num_inside
        for row in ledger.records(with_flagged=False):
            if row["origin"]:
                num_inside += 1
                continue
            record = json.loads(row["record"])
            yield f"{json.dumps(str(Path(record['image']).absolute()))}: {json.dumps({'caption': record['caption']})}"

    _write_array(out, entries(), "{}")
    return _left_out(num_inside, out)


def _left_out(num_inside: int, out: Path) -> list[str]:
    if not num_inside:
        return []
    return [f"{num_inside} pictures inside tars, tables or URLs are not in {out}, which can name files only; --format "
            "webdataset takes all"]  # fmt: skip


def _write_webdataset(ledger: Ledger, out: Path) -> list[str]:
    """Tars of PICTURES_A_TAR samples each: the picture's own bytes, its caption and its record."""
    missing = 0
    rows = ledger.records(with_flagged=False)
    number = -1
    is_over = False
    while not is_over:
        number += 1
        path = out / f"{number:06d}.tar"
        require_ours(ledger, path)
        ledger.note_written(path)
        with replaced_file(path) as file, tarfile.open(fileobj=file, mode="w") as tar:
            for _ in range(PICTURES_A_TAR):
                row = next(rows, None)
                if row is None:
                    is_over = True
                    break
                missing += not _add_sample(tar, row)
    for old in out.glob("[0-9]" * 6 + ".tar"):  # of an earlier export with more captions
        if int(old.stem) > number and ledger.written_file(old) is not None:
            old.unlink()
    return [f"{missing} pictures can no longer be read, and are not in {out}"] if missing else []


def _add_sample(tar: tarfile.TarFile, row: Any) -> bool:
    """Adds a picture with its caption; False where the picture can no longer be read."""
    place = from_sql(row["place"])
    try:
        picture = read_picture(place, row["origin"])
    except (MmllmError, OSError):
        return False
    record = json.loads(row["record"])
    ending = ending_of(place) if ending_of(place) in PICTURE_ENDINGS else ".png"  # of a picture inside a table
    members = {ending: picture, ".txt": record["caption"].encode(), ".json": json.dumps(record).encode()}
    for suffix, data in members.items():
        member = tarfile.TarInfo(f"{row['id']:09d}{suffix}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    return True


FORMATS: dict[str, Callable[[Ledger, Path], list[str] | None]] = {
    "jsonl": json_lines.write,
    "parquet": _write_parquet,
    "txt": lambda ledger, out: _write_sidecars(ledger, out, ".txt"),
    "json": lambda ledger, out: _write_sidecars(ledger, out, ".json"),
    "llava": _write_llava,
    "kohya": _write_kohya,
    "webdataset": _write_webdataset,
}
FOLDER_FORMATS = ("txt", "json", "webdataset")
TRAINING_FORMATS = ("txt", "llava", "kohya", "webdataset")  # without flagged captions
