"""Row formats: a raw row of a data file, whose format is recognised by its keys, becomes an Example.

    conversations   LLaVA, LLaMA-Factory's sharegpt   [{"from": "human" | "gpt" | "system", "value": str}]
    messages        OpenAI, TRL, ms-swift             [{"role": "user" | "assistant" | "system", "content"}]
    texts           Cauldron, FineVision              [{"user": str, "assistant": str}], beside `images`
    caption, text   captions                          str, beside one image

A message's content is a string or a list of parts, see `message_rows.py`. A row may also have `id`, `system` (str) and
`image` or `images`: one picture or a list, see `row_pictures.py`. A table may instead have columns that are named like
the members of a tar. An `<image>` mark in a text is the place of a picture. A turn's text is stripped, nothing else.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from uuid import UUID

from mmllm.batch import IMAGE_TOKEN, Example, Message, Role, message
from mmllm.data.message_rows import message_turns
from mmllm.data.row_pictures import RowPicture, locate_picture, row_pictures
from mmllm.data.row_values import check_list, check_object, check_role, check_text, json_type
from mmllm.data.turns import RowTurn, SourceContext, text_turn
from mmllm.errors import shorten
from mmllm.readers.files import LazyImage, RowError
from mmllm.readers.index import ROW_LISTS
from mmllm.readers.tars import CAPTION_SUFFIXES, PICTURE_SUFFIXES, member_row

# LLaVA's role names, https://github.com/haotian-liu/LLaVA/blob/main/docs/Finetune_Custom_Data.md
ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}
STANDARD_ROLES: dict[str, Role] = {"user": "user", "assistant": "assistant", "system": "system"}
PAIR_ROLES: tuple[Role, Role] = ("user", "assistant")


def row_id(fields: Any, row: int) -> str:
    """The id that the file gives this row, or `#<row>`. Several rows may have the same id."""
    id_text = _id_text(fields.get("id", fields.get("__key__"))) if isinstance(fields, dict) else None
    # Logs take no lone surrogates, and an id may be a whole picture by mistake.
    return f"#{row}" if id_text is None else shorten(id_text.encode(errors="replace").decode())


def _id_text(value: Any) -> str | None:
    """An id as text; None for a value that is no id.

    A whole float is an integer: tables with gaps hold 1.0 for 1. Bytes are decoded as text, or printed in hexadecimal
    where they are none, as the bytes of a UUID.
    """
    if isinstance(value, LazyImage):
        value = value.load()
    if isinstance(value, bytes):
        try:
            text = value.decode()
        except UnicodeDecodeError:
            text = ""
        return text if text.isprintable() and text else value.hex() or None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    is_id = isinstance(value, str | int | UUID) and not isinstance(value, bool) and value != ""
    return str(value) if is_id else None


def to_example(fields: Any, row: int, source: str, context: SourceContext) -> Example:
    """The Example of a raw row, pictures not yet read. Raises RowError with the reason where the row cannot be used."""
    if not isinstance(fields, dict):
        raise RowError(f"the row is {json_type(fields)}; it must be an object with {' or '.join(ROW_FORMATS)}")
    fields = _row_of_columns({key: value for key, value in fields.items() if value is not None})
    id_value = fields.get("id", "")
    if id_value != "" and _id_text(id_value) is None:
        raise RowError(f"id is {json_type(id_value)}; it must be a string or a whole number")
    row_format = _row_format(fields)
    for key in UNSUPPORTED_KEYS & fields.keys():
        if fields[key]:
            raise RowError(f"the row has {key}, which is not trained on; remove the key or the row")
    fields[row_format] = _parse_turns(fields[row_format], row_format)
    pictures = row_pictures(fields)
    turns = ROW_FORMATS[row_format](fields, context)
    if system := fields.get("system"):
        turns.insert(0, text_turn("system", "system", system, "system"))
    names = {role: name for name, role in (ROLES if row_format == "conversations" else STANDARD_ROLES).items()}
    messages = _messages(turns, names)
    # A LazyImage is no ImageSource: `load_pictures` reads it before the example leaves this room.
    images: Any = tuple(_pictures_in_order(turns, pictures, names["user"], context))
    return Example(row_id(fields, row), source, messages, images)


def _row_format(fields: Mapping[str, Any]) -> str:
    """The one key of ROW_FORMATS that the row has. Raises RowError for none or several; empty texts do not count."""
    keys = [key for key in ROW_FORMATS if fields.get(key, "") != ""] or [key for key in ROW_FORMATS if key in fields]
    if not keys:
        has_keys = ", ".join(map(str, fields)) or "none"
        raise RowError(f"the row has none of {', '.join(ROW_FORMATS)}; its keys: {has_keys}")
    if len(keys) > 1:
        raise RowError(f"the row has {' and '.join(keys)}, which say the same thing twice; keep one of them")
    return keys[0]


def _parse_turns(value: Any, key: str) -> Any:
    """The turns of a row as a list; some tables hold them as JSON text. Raises RowError."""
    if key not in ROW_LISTS or not isinstance(value, str | LazyImage):
        return value
    text = value.load().decode(errors="replace") if isinstance(value, LazyImage) else value
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith(("[{'", "{'")):
            raise RowError(f"{key} is a list as Python prints it; write it with json.dumps") from error
        raise RowError(f"{key} is a string; it must be a list, or JSON text of one ({error})") from error


def _row_of_columns(fields: dict[str, Any]) -> dict[str, Any]:
    """The row of a table whose columns are named like a tar's members: `jpg`, `txt`, `json`, `__key__`."""
    endings = {key: key.rsplit(".", 1)[-1].lower() for key in fields}
    has_picture = any(ending in PICTURE_SUFFIXES for ending in endings.values())
    if not (has_picture or "__key__" in fields) or fields.get("image") or fields.get("images"):
        return fields
    members = {key: value for key, value in fields.items() if endings[key] in TAR_COLUMNS and not key.startswith("__")}
    id_text = _id_text(fields.get("id", fields.get("__key__")))
    row = member_row({"__key__": id_text, **members}, _read_column)
    others = {key: value for key, value in fields.items() if key not in members and not key.startswith("__")}
    return {key: value for key, value in {**others, **row}.items() if value is not None}


def _read_column(value: Any) -> Any:
    """A column's value as `add_member` takes it: bytes, or what the table has parsed already."""
    return value.load() if isinstance(value, LazyImage) else value


# Pictures


def _pictures_in_order(
    turns: list[RowTurn], pictures: list[RowPicture], user: str, context: SourceContext
) -> Iterator[RowPicture]:
    """One picture for each mark, in order. Raises RowError where marks and pictures do not match.

    LLaVA's code accepts a row with one image and no mark, and then trains on it without the image.
    """
    marks = [picture for turn in turns for picture in turn.pictures]
    indices = {mark for mark in marks if isinstance(mark, int)}
    num_open, num_images = sum(mark is None for mark in marks), len(pictures)
    if indices and (num_open or indices != set(range(num_images))):
        listed = ", ".join(map(str, sorted(indices)))
        raise RowError(
            f"parts have the index {listed} and {num_open} have none, but the row has {num_images} pictures; give "
            "every part the index of a picture, from 0, and use each picture"
        )
    if not indices and num_open != num_images:
        marks_counted = f"{num_open} {IMAGE_TOKEN} mark{'s' * (num_open != 1)}"
        images_counted = f"{num_images} image{'s' * (num_images != 1)}"
        raise RowError(
            f"{marks_counted} in the {user} turns but {images_counted}; write {IMAGE_TOKEN} once for each image, in "
            "its place"
        )
    remaining = iter(pictures)
    for mark in marks:
        picture = pictures[mark] if isinstance(mark, int) else next(remaining) if mark is None else mark
        yield locate_picture(picture, context.image_folder)


# Turns


def _conversations(fields: Mapping[str, Any], context: SourceContext) -> list[RowTurn]:
    turns = []
    for index, value in enumerate(check_list(fields["conversations"], "conversations", "turns")):
        turn = check_object(value, f"turn {index}", "from and value")
        role = check_role(turn.get("from"), ROLES, f"turn {index}")
        turns.append(text_turn(role, turn["from"], turn.get("value"), f"value of turn {index}"))
    return turns


def _texts(fields: Mapping[str, Any], context: SourceContext) -> list[RowTurn]:
    """Cauldron's pairs. Its texts have no marks, so the pictures come first, where Cauldron's own loaders put them."""
    turns = []
    for index, value in enumerate(check_list(fields["texts"], "texts", "pairs")):
        pair = check_object(value, f"text {index}", "user and assistant")
        turns += [text_turn(role, role, pair.get(role), f"{role} of text {index}") for role in PAIR_ROLES]
    num_images = len(row_pictures(fields))
    if num_images and not any(turn.pictures for turn in turns):
        turns[0] = text_turn("user", "user", IMAGE_TOKEN * num_images + "\n" + turns[0].text, "text 0")
    return turns


def _caption(key: str, fields: Mapping[str, Any], context: SourceContext) -> list[RowTurn]:
    if not row_pictures(fields):
        raise RowError(f"the row has {key} but no image; a caption needs the picture that it describes")
    answer = check_text(fields[key], key)
    if reason := _why_unfinished(fields):
        raise RowError(reason)
    if IMAGE_TOKEN in answer:
        raise RowError(f"{key} holds {IMAGE_TOKEN}; a caption must be text alone")
    return [
        RowTurn("user", "user", f"{IMAGE_TOKEN}\n{context.caption_prompt}", (None,)),
        RowTurn("assistant", key, answer, ()),
    ]


def _why_unfinished(fields: Mapping[str, Any]) -> str | None:
    """Why a caption that `mmllm caption` wrote must not be learnt; None where it may be, and for other rows."""
    if "model_hash" not in fields or "num_new_tokens" not in fields:
        return None
    if fields.get("finish") == "length":
        return (
            f"the caption was cut off after {fields['num_new_tokens']} tokens; run the same `mmllm caption` with a "
            "larger --max-new-tokens, which writes it again"
        )
    if fields.get("finish") == "empty":
        return "the caption has no words"
    if flags := fields.get("flags"):
        return (
            f"the caption was flagged ({flags}); approve it by removing its flags, or run `mmllm caption` with --redo"
        )
    return None


# A row has exactly one of these keys.
ROW_FORMATS: dict[str, Callable[[Mapping[str, Any], SourceContext], list[RowTurn]]] = {
    "conversations": _conversations,
    "messages": message_turns,
    "texts": _texts,
    "caption": functools.partial(_caption, "caption"),
    "text": functools.partial(_caption, "text"),
}
# Keys of these formats that change what is to be learnt, so it would be wrong to ignore them.
UNSUPPORTED_KEYS = {"videos", "video", "audios", "audio", "tools", "objects", "chosen", "rejected", "rejected_response"}
TAR_COLUMNS = {*PICTURE_SUFFIXES, *CAPTION_SUFFIXES, "json"}  # of tables that were made from tars
KNOWN_KEYS = {*ROW_FORMATS, *UNSUPPORTED_KEYS, "id", "image", "images", "system"}


def unread_keys(fields: Any) -> list[str]:
    """The keys of a row that have a value but are not read, such as `source` or ratings."""
    keys = (
        shorten(str(key)) for key, value in fields.items() if key not in KNOWN_KEYS and value not in (None, "", [], {})
    )
    return [key for key in keys if not key.startswith("__") and key.rsplit(".", 1)[-1].lower() not in TAR_COLUMNS]


def _messages(turns: list[RowTurn], names: Mapping[Role, str]) -> tuple[Message, ...]:
    """The messages of the turns: an optional system turn, then user and assistant in turn, the assistant last.

    `names` are what the row format calls the roles, for errors. Raises RowError for another order or an empty turn.
    """
    messages: list[Message] = []
    num_images = 0
    expected: tuple[Role, ...] = ("system", "user")
    for index, turn in enumerate(turns):
        text = turn.text.strip()
        if turn.role not in expected:
            raise RowError(
                f"turn {index} is from {turn.name}, expected {' or '.join(names[role] for role in expected)}; "
                f"after an optional system turn, {names['user']} and {names['assistant']} alternate"
            )
        if not text:
            raise RowError(f"turn {index}, from {turn.name}, is empty; every turn needs a text")
        if turn.pictures and turn.role != "user":
            raise RowError(
                f"turn {index}, from {turn.name}, holds {IMAGE_TOKEN}; images belong in {names['user']} turns"
            )
        expected = ("assistant",) if turn.role == "user" else ("user",)
        messages.append(message(turn.role, text, num_images))
        num_images += len(turn.pictures)
    if messages[-1].role != "assistant":
        raise RowError(
            f"the last turn is from {turns[-1].name}; it must be from {names['assistant']}, as the answer to learn"
        )
    return tuple(messages)
