"""Every row shape becomes the same Example; what a shape does not allow is refused with its reason."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmllm.batch import Example, ImageRef, Message
from mmllm.data.formats import ROW_FORMATS, UNSUPPORTED_KEYS, to_example, unread_keys
from mmllm.data.turns import SourceContext
from mmllm.images import load_image
from mmllm.readers.files import LazyImage, RowError

Row = dict[str, Any]


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 3), "red").save(buffer, "PNG")
    return buffer.getvalue()


DATA_URL = "data:image/png;base64," + base64.b64encode(png()).decode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png())
    return tmp_path


def read(folder: Path, row: Row) -> Example:
    return to_example(row, 0, "source", SourceContext(str(folder), "Describe the picture."))


def reason(folder: Path, row: Row) -> str:
    with pytest.raises(RowError) as caught:
        read(folder, row)
    return str(caught.value)


def asked(question: Any, answer: Any = "Red.") -> list[Row]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


TEXT = {"type": "text", "text": "\nWhat is it?"}
QUESTION = (ImageRef(0), "\nWhat is it?")
# One question about one picture, in every shape that there is.
ONE: list[tuple[str, Row]] = [
    (
        "LLaVA",
        {
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Red."}],
        },
    ),
    (
        "LLaMA-Factory sharegpt",
        {
            "images": ["a.png"],
            "system": "",
            "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Red."}],
        },
    ),
    ("Cauldron", {"images": ["a.png"], "texts": [{"user": "What is it?", "assistant": "Red.", "source": "VQA"}]}),
    (
        "FineVision",
        {
            "images": [{"path": "a.png", "bytes": None}],
            "texts": [{"user": "What is it?", "assistant": "Red."}],
            "source": "vqa",
            "relevance_ratings": [5],
            "relevance_min": 5,
            "formatting_ratings": [4],
        },
    ),
    ("messages, inline", {"images": ["a.png"], "messages": asked("<image>\nWhat is it?")}),
    ("ms-swift", {"image": {"path": "a.png"}, "messages": asked("<image>\nWhat is it?")}),
    ("TRL", {"images": ["a.png"], "messages": asked([{"type": "image"}, TEXT], [{"type": "text", "text": "Red."}])}),
    ("Qwen", {"messages": asked([{"type": "image", "image": "a.png"}, TEXT])}),
    (
        "parquet, null where nothing is",
        {
            "conversations": None,
            "images": ["a.png"],
            "messages": asked([{"type": "image", "text": None, "image": None}, {**TEXT, "image": None}]),
        },
    ),
    ("OpenAI, path", {"messages": asked([{"type": "image_url", "image_url": {"url": "a.png"}}, TEXT])}),
]


@pytest.mark.parametrize("row", [row for _, row in ONE], ids=[name for name, _ in ONE])
def test_every_shape_says_the_same(folder: Path, row: Row) -> None:
    assert read(folder, {"id": 7, **row}) == Example(
        "7", "source", (Message("user", QUESTION), Message("assistant", ("Red.",))), (str(folder / "a.png"),)
    )


@pytest.mark.parametrize("key", ["caption", "text"])
def test_a_caption_answers_the_prompt(folder: Path, key: str) -> None:
    example = read(folder, {"image": "a.png", key: " A red square. "})
    assert example.messages == (
        Message("user", (ImageRef(0), "\nDescribe the picture.")),
        Message("assistant", ("A red square.",)),
    )
    assert example.id == "#0"


def test_every_shape_is_tried() -> None:
    tried = {key for _, row in ONE for key in row if key in ROW_FORMATS}
    assert tried | {"caption", "text"} == set(ROW_FORMATS)


@pytest.mark.parametrize("picture", [{"bytes": png(), "path": None}, {"bytes": png(), "path": "gone.png"}, png()])
def test_bytes_in_a_row_are_the_picture(folder: Path, picture: Any) -> None:
    example = read(folder, {"images": [picture], "texts": [{"user": "What?", "assistant": "Red."}]})
    assert load_image(example.images[0]).size == (2, 3)


@pytest.mark.parametrize("url", [DATA_URL, {"url": DATA_URL}, {"url": DATA_URL, "detail": "low"}])
def test_a_data_url_is_decoded(folder: Path, url: Any) -> None:
    example = read(folder, {"messages": asked([{"type": "image_url", "image_url": url}, TEXT])})
    assert example.images == (png(),)


def test_pictures_fill_marks_in_order_and_parts_bring_their_own(folder: Path) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image", "image": "b.png"}, {"type": "image"}]
    example = read(folder, {"images": ["a.png", png()], "messages": asked(parts)})
    assert example.messages[0].parts == (ImageRef(0), "or", ImageRef(1), ImageRef(2))
    assert example.images == (str(folder / "a.png"), str(folder / "b.png"), png())


def test_cauldron_pictures_come_before_the_first_question_unless_the_text_places_them(folder: Path) -> None:
    texts = [{"user": "What?", "assistant": "Two."}, {"user": "And?", "assistant": "No."}]
    example = read(folder, {"images": ["a.png", "b.png"], "texts": texts})
    assert example.messages[0].parts == (ImageRef(0), ImageRef(1), "\nWhat?")
    placed = [texts[0], {"user": "And <image> or <image>?", "assistant": "No."}]
    example = read(folder, {"images": ["a.png", "b.png"], "texts": placed})
    assert example.messages[2].parts == ("And ", ImageRef(0), " or ", ImageRef(1), "?")


def test_a_system_text_beside_the_turns_comes_first(folder: Path) -> None:
    example = read(folder, {"messages": asked("Hi", "Ho"), "system": "Be kind."})
    assert [message.role for message in example.messages] == ["system", "user", "assistant"]
    assert "expected user" in reason(
        folder, {"system": "Be kind.", "messages": [{"role": "system", "content": "x"}, *asked("Hi")]}
    )


def test_file_urls_are_paths_and_remote_folders_give_stored_pictures(folder: Path) -> None:
    row = {"image": f"file://{folder}/a.png", "caption": "Red."}
    assert read(folder, row).images == (f"{folder}/a.png",)
    context = SourceContext("memory://pictures", "What?")
    (image,) = to_example({"image": "a.png", "caption": "Red."}, 0, "s", context).images
    assert isinstance(image, LazyImage)
    assert image.name == "memory://pictures/a.png"


REFUSED: list[tuple[Row, str]] = [
    ({"messages": asked("Hi"), "conversations": []}, "the row has conversations and messages, which say the same"),
    ({"q": "Hi", "id": 1}, "the row has none of conversations, messages, texts, caption, text; its keys: q"),
    ({}, "its keys: none"),
    ({"image": "a.png", "images": ["a.png"], "messages": asked("<image>")}, "the row has image and images; keep one"),
    # pictures
    ({"images": ["a.png"], "messages": asked("Hi")}, "0 <image> marks in the user turns but 1 image; write <image>"),
    ({"images": ["a.png"], "messages": asked([TEXT])}, "0 <image> marks in the user turns but 1 image; write"),
    ({"messages": asked([{"type": "image"}])}, "1 <image> mark in the user turns but 0 images"),
    ({"images": ["https://x.org/a.png"], "messages": asked("<image>")}, "https://x.org/a.png is an address; images"),
    ({"images": ["s3://x/a.png"], "messages": asked("<image>")}, "s3://x/a.png is an address"),
    (
        {"messages": asked([{"type": "image_url", "image_url": {"url": "http://x.org/a.png"}}])},
        "http://x.org/a.png is an address",
    ),
    ({"messages": asked([{"type": "image_url", "image_url": {}}])}, "image_url of part 0 of turn 0 is an empty path"),
    ({"messages": asked([{"type": "image_url"}])}, "image_url of part 0 of turn 0 is an empty path"),
    ({"images": ["data:image/png,abc"], "messages": asked("<image>")}, "a data: URL must be data:image/...;base64,"),
    ({"images": ["data:image/png;base64,%%"], "messages": asked("<image>")}, "a data: URL whose base64 is damaged"),
    # turns
    ({"messages": [{"role": "tool", "content": "x"}]}, "turn 0 is from tool: answers of tools are not trained on"),
    ({"messages": [{"from": "human", "value": "x"}]}, "turn 0 is from None; allowed: user, assistant, system"),
    ({"messages": [{**asked("Hi")[0], "loss": False}]}, "turn 0 has loss, which is not trained on; allowed: role"),
    ({"messages": asked(None)}, "content of turn 0 is null; it must be a string"),
    ({"messages": asked("Hi", [])}, "turn 1, from assistant, is empty; every turn needs a text"),
    ({"messages": asked("Hi", [{"type": "image", "image": "a.png"}])}, "turn 1, from assistant, holds <image>"),
    ({"messages": asked(["Hi"])}, "part 0 of turn 0 is a string; it must be an object with a type"),
    ({"messages": asked([{"type": "video"}])}, "part 0 of turn 0 is of type 'video'; allowed: text,"),
    ({"messages": asked([{"type": "text"}])}, "text of part 0 of turn 0 is null; it must be a string"),
    ({"messages": asked("Hi")[:1]}, "the last turn is from user; it must be from assistant, as the answer to learn"),
    ({"messages": asked("Hi")[1:]}, "turn 0 is from assistant, expected system or user; after an optional system turn"),
    ({"texts": []}, "texts is empty; it must be a list of pairs"),
    ({"texts": ["Hi"]}, "text 0 is a string; it must be an object with user and assistant"),
    ({"texts": [{"user": "Hi"}]}, "assistant of text 0 is null; it must be a string"),
    ({"texts": [{"user": "Hi", "assistant": " "}]}, "turn 1, from assistant, is empty"),
    # captions
    ({"caption": "Red."}, "the row has caption but no image; a caption needs the picture that it describes"),
    ({"image": "a.png", "text": " "}, "turn 1, from text, is empty"),
    ({"image": "a.png", "caption": ["Red."]}, "caption is a list; it must be a string"),
    ({"image": "a.png", "caption": "a <image>"}, "caption holds <image>; a caption must be text alone"),
    ({"images": ["a.png", "b.png"], "caption": "Red."}, "1 <image> mark in the user turns but 2 images"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "text"), REFUSED, ids=[text[:50] for _, text in REFUSED])
def test_what_a_shape_does_not_allow_is_refused(folder: Path, row: Row, text: str) -> None:
    assert text in reason(folder, row)


@pytest.mark.parametrize("key", sorted(UNSUPPORTED_KEYS))
def test_keys_that_change_what_is_learnt_are_refused_and_empty_ones_are_not(folder: Path, key: str) -> None:
    assert f"the row has {key}, which is not trained on" in reason(folder, {"messages": asked("Hi"), key: ["x"]})
    assert read(folder, {"messages": asked("Hi"), key: []}).images == ()


def test_keys_that_are_not_read_are_named() -> None:
    row = {"id": 1, "model": "", "source": "vqa", "messages": [], "relevance_ratings": [5], "images": []}
    assert unread_keys(row) == ["source", "relevance_ratings"]
