"""read_source: LLaVA's JSON becomes examples; each row that cannot be used is kept with its reason."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmllm.batch import Example, ImageRef, Message
from mmllm.config import SourceConfig
from mmllm.data.formats import ROLES
from mmllm.data.sources import BadRow, DataError, LoadedSource, read_source

Row = dict[str, Any]
SUFFIXES = (".json", ".jsonl")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with the pictures a.png, b.png and sub/c.png."""
    (tmp_path / "sub" / "empty").mkdir(parents=True)
    for name in ("a.png", "b.png", "sub/c.png"):
        Image.new("RGB", (2, 2), "red").save(tmp_path / name)
    return tmp_path


def turns(*values: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation in LLaVA's words, human first."""
    head = [{"from": "system", "value": system}] if system is not None else []
    return head + [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def row(**changes: Any) -> Row:
    """A good row with one image; a change to None leaves the key out."""
    fields = {"id": "1", "image": "a.png", "conversations": turns("<image>\nWhat is it?", "A red square.")}
    return {key: value for key, value in {**fields, **changes}.items() if value is not None}


def write(folder: Path, rows: Any, name: str = "data.json") -> SourceConfig:
    path = folder / name
    lines = name.endswith(".jsonl")
    path.write_text("\n".join(json.dumps(r) for r in rows) if lines else json.dumps(rows), encoding="utf-8")
    return SourceConfig(path=str(path))


def read(folder: Path, *rows: Any) -> LoadedSource:
    return read_source(write(folder, list(rows)))


def only(folder: Path, **changes: Any) -> Example:
    """The one example of a row that must be good."""
    source = read(folder, row(**changes))
    assert source.bad == []
    return source.examples[0]


def reason(folder: Path, fields: Any) -> str:
    """Why a row is refused, beside a good one that must not suffer from it."""
    source = read(folder, fields, row(id="good"))
    assert [example.id for example in source.examples] == ["good"]
    (bad,) = source.bad
    assert (bad.source, bad.row) == (source.path, 0)
    assert "\n" not in bad.reason
    return bad.reason


# What is read


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_reader_gives_the_same_examples(folder: Path, suffix: str) -> None:
    rows = [row(), row(id="2", image=None, conversations=turns("Hello.", "Hello, you.", "And?", "Well."))]
    config = write(folder, rows, f"data{suffix}")
    source = read_source(config)
    assert source.bad == []
    assert list(source.examples) == [
        Example(
            id="1",
            source=config.path,
            messages=(
                Message("user", (ImageRef(0), "\nWhat is it?")),
                Message("assistant", ("A red square.",)),
            ),
            images=(str(folder / "a.png"),),
        ),
        Example(
            id="2",
            source=config.path,
            messages=(
                Message("user", ("Hello.",)),
                Message("assistant", ("Hello, you.",)),
                Message("user", ("And?",)),
                Message("assistant", ("Well.",)),
            ),
        ),
    ]


@pytest.mark.parametrize(("value", "parts"), [
    ("<image>\nWhat?", (ImageRef(0), "\nWhat?")),
    ("What?\n<image>", ("What?\n", ImageRef(0))),
    ("This <image> here", ("This ", ImageRef(0), " here")),
    ("<image>", (ImageRef(0),)),
    ("\n <image> \n What? \t\n", (ImageRef(0), " \n What?")),
])  # fmt: skip
def test_text_is_kept_around_the_mark_and_stripped_at_both_ends(folder: Path, value: str, parts: tuple[Any]) -> None:
    assert only(folder, conversations=turns(value, "  Yes. \n")).messages == (
        Message("user", parts),
        Message("assistant", ("Yes.",)),
    )


def test_marks_number_the_images_through_the_whole_conversation(folder: Path) -> None:
    asked = turns("<image> or <image>?", "The first.", "And <image>?", "No.")
    example = only(folder, image=["b.png", "sub/c.png", "a.png"], conversations=asked)
    assert example.messages[0].parts == (ImageRef(0), " or ", ImageRef(1), "?")
    assert example.messages[2].parts == ("And ", ImageRef(2), "?")
    assert example.images == tuple(str(folder / name) for name in ("b.png", "sub/c.png", "a.png"))


def test_a_system_turn_may_come_first(folder: Path) -> None:
    example = only(folder, image=None, conversations=turns("Hi", "Ho", system="Be short."))
    assert [(m.role, m.text) for m in example.messages] == [
        ("system", "Be short."),
        ("user", "Hi"),
        ("assistant", "Ho"),
    ]


@pytest.mark.parametrize("image", [{}, {"image": None}, {"image": []}, {"model": ""}])
def test_rows_without_an_image_are_text_only(folder: Path, image: Row) -> None:
    source = read(folder, {"id": "t", "conversations": turns("Hi", "Ho"), **image})
    assert source.bad == []
    assert source.examples[0].images == ()


def test_ids_are_made_unique(folder: Path) -> None:
    rows = [row(id="x"), row(id=7), row(id="x"), row(id="7"), row(id=None), row(id=""), row(id="x")]
    examples = read(folder, *rows).examples
    assert [e.id for e in examples] == ["x", "7", "x#2", "7#3", "#4", "#5", "x#6"]
    assert list(examples.ids()) == [e.id for e in examples]
    assert (examples[-1].id, examples[2].id, [e.id for e in examples[1:3]]) == ("x#6", "x#2", ["7", "x#2"])
    with pytest.raises(IndexError):
        examples[7]


def test_ids_do_not_depend_on_which_rows_are_good(folder: Path) -> None:
    source = read(folder, row(id="x", image="gone.png"), row(id="x"))
    assert [bad.id for bad in source.bad] == ["x"]
    assert [example.id for example in source.examples] == ["x#1"]


def test_images_start_from_the_given_folder(folder: Path) -> None:
    config = write(folder, [row(image="c.png")])
    assert len(read_source(config).examples) == 0
    found = read_source(config.model_copy(update={"images": str(folder / "sub")}))
    assert found.examples[0].images == (str(folder / "sub" / "c.png"),)


def test_an_absolute_image_path_is_taken_as_it_is(folder: Path) -> None:
    config = write(folder / "sub", [row(image=str(folder / "a.png"))])
    assert read_source(config).examples[0].images == (str(folder / "a.png"),)


def test_images_are_not_decoded(folder: Path) -> None:
    (folder / "a.png").write_text("no picture")
    assert only(folder).images == (str(folder / "a.png"),)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_max_examples_counts_usable_rows(folder: Path, suffix: str) -> None:
    rows = [row(id="bad", image="gone.png"), *(row(id=str(i)) for i in range(5))]
    config = write(folder, rows, f"data{suffix}").model_copy(update={"max_examples": 2})
    source = read_source(config)
    assert [e.id for e in source.examples] == ["0", "1"]
    assert [b.id for b in source.bad] == ["bad"]


def test_blank_lines_and_a_byte_order_mark_do_no_harm(folder: Path) -> None:
    path = folder / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(row(id="ä")).encode() + b"\r\n\r\n" + json.dumps(row()).encode())
    assert [e.id for e in read_source(SourceConfig(path=str(path))).examples] == ["ä", "1"]
    plain = folder / "data.json"
    plain.write_bytes(b"\xef\xbb\xbf" + json.dumps([row()]).encode())
    assert len(read_source(SourceConfig(path=str(plain))).examples) == 1


# Rows that are refused


def turn(**changes: Any) -> list[dict[str, Any]]:
    """A text-only conversation whose answer is changed."""
    return [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho", **changes}]


BAD_ROWS: list[tuple[Any, str]] = [
    ("text", "the row is a string; it must be an object with conversations or messages or"),
    (None, "the row is null; it must be an object with conversations"),
    (row(id=["a"]), "id is a list; it must be a string or a whole number"),
    (row(id=True), "id is a truth value; it must be a string or a whole number"),
    (row(id=1.5), "id is a number; it must be a string or a whole number"),
    # images
    (row(image=3), "image is a number; it must be a string"),
    (row(image={"file": "a.png"}), "image is an object; it must be a string, a path, or an object with path or bytes"),
    (row(image=["a.png", None]), "image is null; it must be a string"),
    (row(image=""), "1 <image> mark in the human turns but 0 images"),
    (row(image=["a.png", ""]), "image has an empty path beside others; leave it out"),
    (row(image="gone.png"), "no image file at {folder}/gone.png; image paths start from {folder}, which `images`"),
    (row(image="sub"), "no image file at {folder}/sub; image paths start from"),
    (row(image="a\0.png"), "no image file at {folder}/a"),
    (row(image="n" * 5000), "cannot be read (File name too long)"),
    # marks
    (row(image=None), "1 <image> mark in the human turns but 0 images; write <image> once for each image"),
    (
        row(image=["a.png", "b.png"]),
        "1 <image> mark in the human turns but 2 images; write <image> once for each",
    ),
    (
        row(conversations=turns("What is it?", "It.")),
        "0 <image> marks in the human turns but 1 image; write <image>",
    ),
    (row(conversations=turns("<image><image>", "It.")), "2 <image> marks in the human turns but 1 image;"),
    (row(conversations=turns("What?", "<image>")), "turn 1, from gpt, holds <image>; images belong in human turns"),
    (row(conversations=turns("What?", "It.", system="<image>")), "turn 0, from system, holds <image>; images belong"),
    # turns
    (row(conversations=None), "the row has none of conversations, messages, texts, caption, text; its keys: id, image"),
    (row(conversations=[]), "conversations is empty; it must be a list of turns"),
    (row(conversations="Hi"), "conversations is a string; it must be a list, or JSON"),
    (row(conversations=["Hi"]), "turn 0 is a string; it must be an object with from and value"),
    (row(conversations=turn(**{"from": "user"})), "turn 1 is from 'user'; allowed: human, gpt, system"),
    (row(conversations=turn(**{"from": ["gpt"]})), "turn 1 is from ['gpt']; allowed: human, gpt, system"),
    (row(conversations=[{"value": "Hi"}]), "turn 0 is from None; allowed: human, gpt, system"),
    (row(conversations=turn(value=None)), "value of turn 1 is null; it must be a string"),
    (row(conversations=turn(value=4)), "value of turn 1 is a number; it must be a string"),
    (row(conversations=turn(value="")), "turn 1, from gpt, is empty; every turn needs a text"),
    (row(conversations=turn(value=" \n\t")), "turn 1, from gpt, is empty; every turn needs a text"),
    (row(conversations=turns("", "Ho")), "turn 0, from human, is empty; every turn needs a text"),
    (row(conversations=turn(value="x\ud83d")), "value of turn 1 holds half a character (\\ud83d) at 1"),
    # order
    (row(conversations=turns("Hi")), "the last turn is from human; it must be from gpt, as the answer to learn"),
    (row(conversations=turns("Hi", "Ho", "Hm")), "the last turn is from human; it must be from gpt"),
    (row(conversations=turns(system="Short.")), "the last turn is from system; it must be from gpt"),
    (
        row(conversations=turns("Hi", "Ho")[1:]),
        "turn 0 is from gpt, expected system or human; after an optional system",
    ),
    (row(conversations=turns("Hi", "Ho")[:1] * 2), "turn 1 is from human, expected gpt; after an optional system turn"),
    (row(conversations=turns("Hi", "Ho") + turns("Hi", "Ho")[1:]), "turn 2 is from gpt, expected human;"),
    (row(conversations=turns("Hi", "Ho") + turns(system="Short.")), "turn 2 is from system, expected human;"),
    (row(conversations=turns("Hi", "Ho", system="x")[:1] * 2), "turn 1 is from system, expected human;"),
]


@pytest.mark.parametrize(("fields", "text"), BAD_ROWS, ids=[text[:40] for _, text in BAD_ROWS])
def test_a_bad_row_is_kept_with_its_reason_and_costs_no_other(folder: Path, fields: Any, text: str) -> None:
    assert text.format(folder=folder) in reason(folder, fields)


def test_all_bad_rows_are_counted(folder: Path) -> None:
    rows = [fields for fields, _ in BAD_ROWS]
    source = read(folder, *rows)
    assert len(source.examples) == 0
    assert [bad.row for bad in source.bad] == list(range(len(rows)))


def test_a_bad_row_says_where_it_stands(folder: Path) -> None:
    config = write(folder, [row(), row(), row(image="gone.png")], "data.jsonl")
    (bad,) = read_source(config).bad
    assert bad == BadRow(config.path, 2, "1", bad.reason)
    assert "gone.png" in bad.reason


def test_an_id_can_always_be_printed(folder: Path) -> None:
    (example,) = read(folder, row(id="x\ud83d")).examples
    assert example.id == "x?"


GOOD = json.dumps(row())

UNPARSED: list[tuple[str, bytes, str]] = [
    ("data.json", b'[{"id": "1", "x": 2,}, %b]', "(JSON has no comma before a closing bracket)"),
    ("data.json", b"[9%b, %%b]" % (b"9" * 5000), "the row cannot be read as JSON: Exceeds the limit"),
    (
        "data.json",
        b"[%b%b, %%b]" % (b"[" * 100_000, b"]" * 100_000),
        "the row cannot be read as JSON: maximum recursion",
    ),
    ("data.json", b'["\xe4", %b]', "the row is not UTF-8 text at byte"),
    ("data.json", b"[, %b]", "a value is missing before a comma or a bracket in line 1"),
    ("data.jsonl", b'{"conversations": [\n%b\n', "the row is not JSON at line "),
    ("data.jsonl", b'"\xe4"\n\n%b', "the row is not UTF-8 text at byte 1"),
]


@pytest.mark.parametrize(("name", "data", "text"), UNPARSED, ids=[f"{n}-{t[:40]}" for n, _, t in UNPARSED])
def test_a_row_that_is_not_json_costs_no_other(folder: Path, name: str, data: bytes, text: str) -> None:
    (folder / name).write_bytes(data % GOOD.encode())
    source = read_source(SourceConfig(path=str(folder / name)))
    assert [example.id for example in source.examples] == ["1"]
    (bad,) = source.bad
    assert bad.row == 0
    assert text in bad.reason


# Files that are refused


def test_role_names_are_those_of_llava() -> None:
    assert ROLES == {"human": "user", "gpt": "assistant", "system": "system"}


BAD_FILES: list[tuple[str, bytes, str]] = [
    ("data.json", b"", "data.json is empty; give a file with at least one conversation"),
    ("data.json", b" \n", "data.json is empty; give a file with at least one conversation"),
    ("data.jsonl", b"\n\n", "data.jsonl holds no rows; give a file with at least one conversation"),
    ("data.json", b"[]", "data.json holds no rows; give a file with at least one conversation"),
    ("data.json", b'"text"', "data.json must hold a list of rows, or one row a line, got a string; put the rows in"),
    ("data.json", f"[{GOOD},\n{GOOD[:-4]}".encode(), "the list that it begins with is never closed"),
    ("data.json", f"[{GOOD}]\n[{GOOD}]".encode(), "data.json is not one JSON list: its end is followed by b'["),
    ("data.json", b"[" * 100_000, "the list that it begins with is never closed"),
    ("data.xml", b"<a/>", "data.xml has the suffix '.xml'; allowed: .json, .jsonl, .parquet, .arrow, .feather,"),
    ("data", b"[]", "data has the suffix ''; allowed: .json, .jsonl"),
]


@pytest.mark.parametrize(("name", "data", "text"), BAD_FILES, ids=[f"{n}-{t[:40]}" for n, _, t in BAD_FILES])
def test_a_file_that_cannot_be_used_gives_one_clear_message(folder: Path, name: str, data: bytes, text: str) -> None:
    (folder / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_source(SourceConfig(path=str(folder / name)))
    assert text in str(caught.value)
    assert str(folder / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("given", "text"), [
    (lambda folder: {"path": f"{folder}/gone.json"}, "no data file at {folder}/gone.json; check `path` of this source"),
    (lambda folder: {"path": f"{folder}/sub/empty"}, "{folder}/sub/empty is a folder without pictures or metadata"),
    (lambda folder: {"path": f"{folder}/{'n' * 5000}.json"}, "cannot be read (File name too long); check the path"),
    (
        lambda folder: {"path": write(folder, [row()]).path, "images": f"{folder}/gone"},
        "no image folder at {folder}/gone, which {folder}/data.json needs; check `images`",
    ),
])  # fmt: skip
def test_a_path_that_leads_nowhere_is_named(folder: Path, given: Callable[[Path], dict[str, str]], text: str) -> None:
    with pytest.raises(DataError) as caught:
        read_source(SourceConfig(**given(folder)))
    assert text.format(folder=folder) in str(caught.value)


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "data.json")
    with pytest.raises(DataError, match=r"no data file at .*data\.json"):
        read_source(SourceConfig(path=str(folder / "data.json")))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_rights_is_named(folder: Path) -> None:
    config = write(folder, [row()])
    Path(config.path).chmod(0)
    with pytest.raises(DataError, match=r"data\.json cannot be read \(Permission denied\); check the path"):
        read_source(config)
