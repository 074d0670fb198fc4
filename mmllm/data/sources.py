"""Readers: a data file on disk becomes examples, and a list of the rows that cannot be used with the reason why.

LLaVA's format, as a JSON list or as JSON lines:
`{"id"?, "image"?: str | [str], "conversations": [{"from": "human" | "gpt" | "system", "value": str}]}`.
Rows count from 0; in JSON lines, blank lines are not rows. A turn's text is stripped at both ends and otherwise kept.
Images are looked for here, and decoded when they are needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mmllm.batch import IMAGE_TOKEN, Example, Message, Role, message
from mmllm.config import SourceConfig

# LLaVA's names, https://github.com/haotian-liu/LLaVA/blob/main/docs/Finetune_Custom_Data.md
ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}
_FROM = {role: name for name, role in ROLES.items()}


class DataError(ValueError):
    """A data file that cannot be used at all; the message names it, says what is wrong and what to do."""


class _RowError(ValueError):
    """Why one row cannot be used."""


@dataclass(frozen=True)
class BadRow:
    """One row that cannot be used: its file, its place (from 0), the id that it would have had, and why."""

    source: str
    row: int
    id: str
    reason: str


@dataclass(frozen=True)
class Source:
    """What one data file holds. Ids are unique within it."""

    path: str
    examples: list[Example]
    bad: list[BadRow]


def read_source(source: SourceConfig) -> Source:
    """All rows of a data file, or those up to the `max_examples`-th usable one.

    A row that cannot be used goes to `bad`. Raises DataError where the file itself cannot be used: it or its image
    folder is missing, it is not JSON, it holds no list or an empty one.
    """
    path = Path(source.path)
    folder = Path(source.images) if source.images is not None else path.parent
    try:
        rows = _rows(path)
        has_folder = folder.is_dir()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path and its rights") from error
    if not has_folder:
        raise DataError(f"no image folder at {folder}, which {path} is to be used with; check `images` of this source")
    examples: list[Example] = []
    bad: list[BadRow] = []
    taken: set[str] = set()
    for row, fields in enumerate(rows):
        example_id = _unique_id(fields, row, taken)
        try:
            examples.append(_example(fields, example_id, source.path, folder))
        except _RowError as error:
            bad.append(BadRow(source.path, row, example_id, str(error)))
        if len(examples) == source.max_examples:
            break
    if not examples and not bad:
        raise DataError(f"{path} holds no rows; give a file with at least one conversation")
    return Source(source.path, examples, bad)


def _rows(path: Path) -> Iterator[Any]:
    reader = READERS.get(path.suffix.lower())
    if path.is_dir():
        raise DataError(f"{path} is a folder; give the path of the data file in it")
    if not path.is_file():
        raise DataError(f"no data file at {path}; check `path` of this source (now in {Path.cwd()})")
    if reader is None:
        raise DataError(f"{path} has the suffix {path.suffix!r}; allowed: {', '.join(READERS)}")
    return reader(path)


def _read_json(path: Path) -> Iterator[Any]:
    with _open(path) as file:
        data = file.read()
    if not data.strip():
        raise DataError(f"{path} is empty; give a file with at least one conversation")
    tree = _parse(data, path)
    if not isinstance(tree, list):
        raise DataError(f"{path} must hold a list of rows, got {_kind(tree)}; put the rows in [ ]")
    yield from tree


def _read_jsonl(path: Path) -> Iterator[Any]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _parse(line, path, first_line=number)


# Data formats by suffix. Each yields the rows; a file that is not of the format is a DataError.
READERS: dict[str, Callable[[Path], Iterator[Any]]] = {".json": _read_json, ".jsonl": _read_jsonl}


def _open(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path and its rights") from error


def _parse(data: bytes, path: Path, first_line: int = 1) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        hint = "; one row a line is JSON lines: name the file .jsonl" if error.msg == "Extra data" else ""
        if path.suffix.lower() == ".jsonl" and data.lstrip().startswith(b"["):
            hint = "; a list over several lines is plain JSON: name the file .json"
        raise DataError(f"{path} is not JSON at line {line}, column {error.colno}: {error.msg}{hint}") from error
    except UnicodeDecodeError as error:
        line = first_line + data[: error.start].count(b"\n")
        raise DataError(f"{path} is not UTF-8 text at line {line}; save it as UTF-8") from error
    except (RecursionError, ValueError) as error:  # nested too deep, a number of too many digits
        raise DataError(f"{path} cannot be read as JSON from line {first_line} on: {error}") from error


def _kind(value: Any) -> str:
    """What a value is in JSON's words."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")


def _unique_id(fields: Any, row: int, taken: set[str]) -> str:
    """The row's own id, with `#<row>` where it has none or where an earlier row, usable or not, has the same."""
    own = fields.get("id") if isinstance(fields, dict) else None
    label = str(own).encode(errors="replace").decode()  # JSON can hold half a character, a log cannot
    example_id = label if _is_id(own) else f"#{row}"
    while example_id in taken:
        example_id += f"#{row}"
    taken.add(example_id)
    return example_id


def _is_id(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool) and value != ""


def _example(fields: Any, example_id: str, source: str, folder: Path) -> Example:
    if not isinstance(fields, dict):
        raise _RowError(f"the row is {_kind(fields)}; it must be an object with conversations")
    own = fields.get("id")
    if own not in (None, "") and not _is_id(own):
        raise _RowError(f"id is {_kind(own)}; it must be a string or a whole number")
    names = _image_names(fields.get("image"))
    messages = _messages(fields.get("conversations"))
    _check_marks(messages, len(names))
    return Example(example_id, source, messages, tuple(_image_path(name, folder) for name in names))


def _check_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _RowError(f"{where} is {_kind(value)}; it must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _RowError(
            f"{where} holds half a character (\\u{ord(value[error.start]):04x}) at {error.start}"
        ) from error
    return value


def _image_names(image: Any) -> list[str]:
    names = [] if image is None else image if isinstance(image, list) else [image]
    for name in names:
        if not _check_text(name, "image"):
            raise _RowError("image is an empty path; leave image out of a row without images")
    return names


def _messages(turns: Any) -> tuple[Message, ...]:
    """An optional system turn, then human and gpt in turn, ending with gpt."""
    if not isinstance(turns, list) or not turns:
        raise _RowError(f"conversations is {'empty' if turns == [] else _kind(turns)}; it must be a list of turns")
    messages: list[Message] = []
    num_images = 0
    expected: tuple[Role, ...] = ("system", "user")
    for index, turn in enumerate(turns):
        role, text = _turn(turn, f"turn {index}")
        if role not in expected:
            raise _RowError(
                f"turn {index} is from {_FROM[role]}, expected {' or '.join(_FROM[r] for r in expected)}; "
                "after an optional system turn, human and gpt alternate"
            )
        expected = ("assistant",) if role == "user" else ("user",)
        messages.append(message(role, text, num_images))
        num_images += text.count(IMAGE_TOKEN)
    if messages[-1].role != "assistant":
        raise _RowError(
            f"the last turn is from {_FROM[messages[-1].role]}; it must be from gpt, as the answer to learn"
        )
    return tuple(messages)


def _turn(turn: Any, where: str) -> tuple[Role, str]:
    if not isinstance(turn, dict):
        raise _RowError(f"{where} is {_kind(turn)}; it must be an object with from and value")
    name = turn.get("from")
    if not isinstance(name, str) or name not in ROLES:
        raise _RowError(f"{where} is from {name!r}; allowed: {', '.join(ROLES)}")
    text = _check_text(turn.get("value"), f"value of {where}").strip()
    if not text:
        raise _RowError(f"{where}, from {name}, is empty; every turn needs a text")
    if IMAGE_TOKEN in text and ROLES[name] != "user":
        raise _RowError(f"{where}, from {name}, holds {IMAGE_TOKEN}; images stand in human turns")
    return ROLES[name], text


def _check_marks(messages: tuple[Message, ...], num_images: int) -> None:
    """One `<image>` for each image. LLaVA lets one image without a mark pass, and then trains blind on that row."""
    num_marks = sum(not isinstance(part, str) for turn in messages for part in turn.parts)
    if num_marks == num_images:
        return
    marks = f"{num_marks} {IMAGE_TOKEN} mark{'s' * (num_marks != 1)}"
    images = f"{num_images} image{'s' * (num_images != 1)}"
    raise _RowError(
        f"{marks} in the human turns but {images}; write {IMAGE_TOKEN} once for each image, where it stands"
    )


def _image_path(name: str, folder: Path) -> str:
    path = folder / name
    try:
        is_there = path.is_file()
    except OSError as error:
        raise _RowError(f"{path} cannot be read ({error.strerror})") from error
    if not is_there:
        raise _RowError(f"no image file at {path}; image paths start from {folder}, which `images` of the source sets")
    return str(path)
