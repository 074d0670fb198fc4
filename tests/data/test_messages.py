"""Messages as clients and exporters dump them: what says nothing is harmless, the rest is read or refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from mmllm.batch import Example
from mmllm.cli import app
from mmllm.config import ConfigError
from mmllm.config.file import load_config
from mmllm.data.check import inspect_sources
from mmllm.data.formats import to_example
from mmllm.data.inspection import RowRules
from mmllm.data.turns import SourceContext
from mmllm.errors import MmllmError, shorten
from mmllm.images import ImageError
from mmllm.readers.files import DataError, RowError

TEXT = {"type": "text", "text": "What color?"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("messages")
    for color in ("red", "blue"):
        Image.new("RGB", (8, 8), color).save(folder / f"{color}.png")
    return folder


def example(folder: Path, content: Any, answer: Any = "red", *before: dict[str, Any], **fields: Any) -> Example:
    """The example of a question and an answer; a dict as answer is the whole message."""
    reply = answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}
    row = {"messages": [*before, {"role": "user", "content": content}, reply], **fields}
    return to_example(json.loads(json.dumps(row)), 0, "x.json", SourceContext(str(folder), "?"))


EMPTY = {
    "refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": [], "tool_call_id": "",
    "reasoning_content": "", "name": "bot", "index": 3, "id": "msg_1", "weight": 1, "loss": True,
    "usage": {"total_tokens": None},
}  # fmt: skip


def test_keys_that_say_nothing_are_harmless(folder: Path) -> None:
    found = example(
        folder, "Hi", {"role": "assistant", "content": "red", **EMPTY}, {"role": "developer", "content": "Be."}
    )
    assert [(message.role, message.text) for message in found.messages] == [
        ("system", "Be."), ("user", "Hi"), ("assistant", "red"),
    ]  # fmt: skip


CALL = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


@pytest.mark.parametrize(("answer", "reason"), [
    ({"role": "assistant", "content": None, "tool_calls": CALL}, "turn 1 has tool_calls, which is not trained on"),
    ({"role": "assistant", "content": "red", "tool_calls": CALL}, "turn 1 has tool_calls, which is not trained on"),
    ({"role": "assistant", "content": None, "refusal": "No."}, "turn 1 has refusal, which is not trained on"),
    ({"role": "assistant", "content": "red", "weight": 0}, "turn 1 has weight, which is not trained on"),
    ({"role": "assistant", "content": "red", "loss": False}, "turn 1 has loss, which is not trained on"),
    ({"role": "assistant", "content": None}, "content of turn 1 is null; it must be a string"),
    ({"role": "tool", "content": "4", "tool_call_id": "1"}, "turn 1 is from tool: answers of tools"),
    ({"role": "function", "name": "f", "content": "4"}, "turn 1 is from function: answers of tools"),
    ({"role": "model", "content": "red"}, "turn 1 is from 'model'; allowed: user, assistant, system, developer"),
])  # fmt: skip
def test_what_is_not_learnt_has_a_named_reason(folder: Path, answer: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        example(folder, "Hi", answer)
    assert reason in str(caught.value)


def data_url(folder: Path) -> str:
    return "data:image/png;base64," + base64.b64encode((folder / "red.png").read_bytes()).decode()


def test_every_way_to_write_the_picture_of_a_part_is_the_same_picture(folder: Path) -> None:
    data = (folder / "red.png").read_bytes()
    text = base64.b64encode(data).decode()
    unions = {"text": None, "url": None, "image": "", "detail": "low", "index": None}
    ways: list[dict[str, Any]] = [
        {"type": "image", "image": "red.png"},
        {"type": "image", "path": "red.png"},
        {"type": "image", "url": "red.png"},
        {"type": "image", "url": data_url(folder)},
        {"type": "image", "base64": text},
        {"type": "image", "base64": data_url(folder)},
        {"type": "image", "base64": base64.encodebytes(data).decode()},
        {"type": "image", "image": text},
        {"type": "image", "image": {"path": "red.png", "bytes": None}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": text}},
        {"type": "image_url", "image_url": {"url": "red.png", "detail": "low"}},
        {"type": "image_url", "image_url": {"url": data_url(folder)}},
        {"type": "image_url", "image_url": data_url(folder)},
        {"type": "input_image", "image_url": data_url(folder)},
    ]
    for way in ways:
        for part in (way, {**unions, **way}):
            (image,) = example(folder, [part, TEXT]).images
            assert (Path(image).read_bytes() if isinstance(image, str) else image) == data, way
    row = {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "red"}]}
    for value in (text, data_url(folder), [text], list(data), {"bytes": list(data), "path": None}):
        for key in ("image", "images"):
            found = to_example({**row, key: value}, 0, "x.json", SourceContext(str(folder), "?"))
            assert found.images == (data,)


def test_parts_name_pictures_of_the_row_by_number(folder: Path) -> None:
    parts = [{"type": "image", "index": 1}, {"type": "image", "index": 0.0}, {"type": "image", "index": 1}, TEXT]
    found = example(folder, parts, images=["red.png", "blue.png"])
    assert [Path(str(image)).name for image in found.images] == ["blue.png", "red.png", "blue.png"]
    for wrong, reason in (
        ([{"type": "image", "index": 0}, TEXT], "the row has 2 pictures"),
        ([{"type": "image", "index": 0}, {"type": "image", "index": 2}, TEXT], "the row has 2 pictures"),
        ([{"type": "image", "index": 0}, {"type": "image"}, TEXT], "1 have none"),
        ([{"type": "image", "index": "0"}, TEXT], "index of part 0 of turn 0 is a string"),
    ):
        with pytest.raises(RowError, match=reason):
            example(folder, wrong, images=["red.png", "blue.png"])


@pytest.mark.parametrize(("part", "reason"), [
    ({"type": "image", "image": "red.png", "url": "blue.png"}, "has image and url; keep one of them"),
    ({"type": "text", "text": "a", "image": "red.png"}, "is of type text but has image; make it two parts"),
    ({"type": "image", "image": "red.png", "text": "a"}, "is of type image but has a text; make it two parts"),
    ({"type": "image", "url": "https://x.org/red.png"}, "https://x.org/red.png is an address"),
    ({"type": "image", "base64": "%%%"}, "base64 of part 0 of turn 0 is base64 that is damaged"),
    ({"type": "image_url", "image_url": {"url": ""}}, "image_url of part 0 of turn 0 is an empty path"),
    ({"type": "image"}, "1 <image> mark in the user turns but 0 images"),
    ({"type": "input_audio", "input_audio": {}}, "is of type 'input_audio'; allowed: text, input_text"),
])  # fmt: skip
def test_a_part_that_is_not_clear_is_refused(folder: Path, part: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        example(folder, [part, TEXT])
    assert reason in str(caught.value)


def test_a_picture_that_says_nothing_is_none(folder: Path) -> None:
    for nothing in ("", None, [], [""], [None], {"path": None, "bytes": None}, {"path": ""}):
        assert example(folder, "Hi", image=nothing).images == ()


# Long values

HUGE = base64.b64encode(bytes(range(256)) * 4000).decode()


def test_no_error_prints_a_whole_picture(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    errors: list[Exception] = [kind(f"{HUGE} is wrong") for kind in (ConfigError, DataError, RowError, ImageError)]
    config = tmp_path / "c.yaml"
    config.write_text(f"stage: stage1\nout: {HUGE}\nextra: {HUGE}\nmodel: {HUGE}\nseed: [{HUGE}, a b, {HUGE}]\n")
    for call in (
        lambda: load_config(config),
        lambda: load_config(config, [f"x={HUGE}", HUGE]),
        lambda: load_config(HUGE),
        lambda: example(folder, [{"type": "image", "image": "x" + HUGE}, TEXT]),
        lambda: example(folder, [{"type": HUGE}, TEXT]),
        lambda: example(folder, "<image>", image="data:" + HUGE),
        lambda: to_example({HUGE: 1}, 0, "x.json", SourceContext(str(folder), "?")),
    ):
        with pytest.raises((MmllmError, OSError)) as caught:
            call()
        errors.append(caught.value)
    assert [str(error)[:300] for error in errors if len(str(error)) > 4000 and not isinstance(error, OSError)] == []
    done = CliRunner().invoke(app, ["check", HUGE])
    assert done.exit_code in (1, 2)
    assert len(done.stderr) < 4000


def test_the_report_of_bad_rows_is_short_too(folder: Path, tmp_path: Path) -> None:
    rows = [{"id": HUGE, "image": "no" + HUGE, "caption": "a"}, {"image": {"path": HUGE}, "caption": "a"}]
    (tmp_path / "x.json").write_text(json.dumps([*rows, {HUGE: HUGE}]))
    from mmllm.config import SourceConfig

    report = inspect_sources([SourceConfig(path=str(tmp_path / "x.json"))], RowRules(None, 1))[1]
    assert report.num_bad == 3
    assert len(json.dumps(report.to_json())) < 8000


def test_what_is_short_stays_as_it_is() -> None:
    for text in ("", "a b\n c", "/a/long/path/" + "x" * 250, "word " * 900):
        assert shorten(text) == text
    assert shorten("a" * 400) == "a" * 80 + "... (400 characters)"
