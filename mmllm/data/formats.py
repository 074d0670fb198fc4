"""The shapes of rows: a raw row of a data file, recognised by its keys, becomes an Example.

    conversations   LLaVA, LLaMA-Factory's sharegpt   [{"from": "human" | "gpt" | "system", "value": str}]
    messages        OpenAI, TRL, ms-swift             [{"role": "user" | "assistant" | "system", "content"}]
    texts           Cauldron, FineVision              [{"user": str, "assistant": str}], beside `images`
    caption, text   captions                          str, beside one image

A message's content is a string or a list of parts, see `message_rows.py`. Beside them stand `id`, `system` (str) and
`image` or `images`: one picture or a list, see `row_pictures.py`. Tables may have the names of a tar's members instead.
`<image>` in a text is the place of a picture. A turn's text is stripped at both ends and otherwise kept.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from uuid import UUID

from mmllm.batch import IMAGE_TOKEN, Example, Message, Role, message
from mmllm.data.message_rows import message_turns
from mmllm.data.row_pictures import RowPicture, check_text, find_picture, kind, row_pictures
from mmllm.data.turns import Context, RowTurn, list_of, object_of, role_of, text_turn
from mmllm.errors import shorten
from mmllm.readers.files import RowError, Stored
from mmllm.readers.index import ROW_LISTS
from mmllm.readers.tars import CAPTION_SUFFIXES, PICTURE_SUFFIXES, member_row

# LLaVA's names, https://github.com/haotian-liu/LLaVA/blob/main/docs/Finetune_Custom_Data.md
ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}
PLAIN_ROLES: dict[str, Role] = {"user": "user", "assistant": "assistant", "system": "system"}
PAIR: tuple[Role, Role] = ("user", "assistant")


def row_id(fields: Any, row: int) -> str:
    """The row's own id, or `#<row>`. Ids are the files' own: several rows may have the same."""
    own = _id_text(fields.get("id", fields.get("__key__"))) if isinstance(fields, dict) else None
    # a log takes no half characters, and nobody reads a picture as an id
    return f"#{row}" if own is None else shorten(own.encode(errors="replace").decode())


def _id_text(value: Any) -> str | None:
    """An id as text: 1.0 of a table with gaps is 1, and bytes are their text, or as UUIDs their hexadecimal digits."""
    if isinstance(value, Stored):
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


def to_example(fields: Any, row: int, source: str, context: Context) -> Example:
    """The Example of a raw row, its pictures not yet read. Raises RowError with the reason where it cannot be one."""
    if not isinstance(fields, dict):
        raise RowError(f"the row is {kind(fields)}; it must be an object with {' or '.join(SHAPES)}")
    fields = _row_of_columns({key: value for key, value in fields.items() if value is not None})
    own = fields.get("id", "")
    if own != "" and _id_text(own) is None:
        raise RowError(f"id is {kind(own)}; it must be a string or a whole number")
    shapes = [name for name in SHAPES if fields.get(name, "") != ""] or [name for name in SHAPES if name in fields]
    if len(shapes) != 1:
        raise RowError(
            f"the row has {' and '.join(shapes)}, which say the same thing twice; keep one of them"
            if shapes
            else f"the row has none of {', '.join(SHAPES)}; its keys: {', '.join(map(str, fields)) or 'none'}"
        )
    for key in UNSUPPORTED & fields.keys():
        if fields[key]:
            raise RowError(f"the row has {key}, which cannot be learnt from here; take the key or the row out")
    fields[shapes[0]] = _parsed(fields[shapes[0]], shapes[0])
    pictures = row_pictures(fields)
    turns = SHAPES[shapes[0]](fields, context)
    if system := fields.get("system"):
        turns.insert(0, text_turn("system", "system", system, "system"))
    names = {role: name for name, role in (ROLES if shapes[0] == "conversations" else PLAIN_ROLES).items()}
    messages = _messages(turns, names)
    # what is `Stored` is read before an example leaves this room
    images: Any = tuple(_place(turns, pictures, names["user"], context))
    return Example(row_id(fields, row), source, messages, images)


def _parsed(value: Any, key: str) -> Any:
    """The turns of a row; tables have them as JSON in a column of text. Raises RowError."""
    if key not in ROW_LISTS or not isinstance(value, str | Stored):
        return value
    text = value.load().decode(errors="replace") if isinstance(value, Stored) else value
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith(("[{'", "{'")):
            raise RowError(f"{key} is a list as Python prints it; write json.dumps of it") from error
        raise RowError(f"{key} is a string; it must be a list, or JSON text of one ({error})") from error


def _row_of_columns(fields: dict[str, Any]) -> dict[str, Any]:
    """The row of a table that has the names of a tar's members as columns: `jpg`, `txt`, `json`, `__key__`."""
    endings = {key: key.rsplit(".", 1)[-1].lower() for key in fields}
    has_picture = any(ending in PICTURE_SUFFIXES for ending in endings.values())
    if not (has_picture or "__key__" in fields) or fields.get("image") or fields.get("images"):
        return fields
    members = {key: value for key, value in fields.items() if endings[key] in COLUMNS and not key.startswith("__")}
    own = _id_text(fields.get("id", fields.get("__key__")))
    row = member_row({"__key__": own, **members}, _column_text)
    others = {key: value for key, value in fields.items() if key not in members and not key.startswith("__")}
    return {key: value for key, value in {**others, **row}.items() if value is not None}


def _column_text(value: Any) -> Any:
    """A column as `add_member` takes it: what is parsed already stays."""
    return value.load() if isinstance(value, Stored) else value


# Pictures


def _place(turns: list[RowTurn], pictures: list[RowPicture], user: str, context: Context) -> Iterator[RowPicture]:
    """One picture a mark, in order. LLaVA lets one image without a mark pass, and then trains blind on that row."""
    places = [place for turn in turns for place in turn.pictures]
    numbers = {place for place in places if isinstance(place, int)}
    num_open, num_images = sum(place is None for place in places), len(pictures)
    if numbers and (num_open or numbers != set(range(num_images))):
        given = ", ".join(map(str, sorted(numbers)))
        raise RowError(
            f"the parts have the index {given} and {num_open} have none, but the row has {num_images} pictures; give "
            "every part the number of one, from 0, and use each"
        )
    if not numbers and num_open != num_images:
        marks = f"{num_open} {IMAGE_TOKEN} mark{'s' * (num_open != 1)}"
        images = f"{num_images} image{'s' * (num_images != 1)}"
        raise RowError(
            f"{marks} in the {user} turns but {images}; write {IMAGE_TOKEN} once for each image, where it stands"
        )
    waiting = iter(pictures)
    for place in places:
        held = pictures[place] if isinstance(place, int) else next(waiting) if place is None else place
        yield find_picture(held, context.images)


# Turns


def _conversations(fields: Mapping[str, Any], context: Context) -> list[RowTurn]:
    turns = []
    for index, value in enumerate(list_of(fields["conversations"], "conversations", "turns")):
        turn = object_of(value, f"turn {index}", "from and value")
        role = role_of(turn.get("from"), ROLES, f"turn {index}")
        turns.append(text_turn(role, turn["from"], turn.get("value"), f"value of turn {index}"))
    return turns


def _texts(fields: Mapping[str, Any], context: Context) -> list[RowTurn]:
    """Cauldron's pairs. Its texts have no marks: the pictures come first, as its own loaders place them."""
    turns = []
    for index, value in enumerate(list_of(fields["texts"], "texts", "pairs")):
        pair = object_of(value, f"text {index}", "user and assistant")
        turns += [text_turn(role, role, pair.get(role), f"{role} of text {index}") for role in PAIR]
    num_images = len(row_pictures(fields))
    if num_images and not any(turn.pictures for turn in turns):
        turns[0] = text_turn("user", "user", IMAGE_TOKEN * num_images + "\n" + turns[0].text, "text 0")
    return turns


def _caption(key: str, fields: Mapping[str, Any], context: Context) -> list[RowTurn]:
    if not row_pictures(fields):
        raise RowError(f"the row has {key} but no image; a caption needs the picture that it tells about")
    answer = check_text(fields[key], key)
    if reason := _unfinished(fields):
        raise RowError(reason)
    if IMAGE_TOKEN in answer:
        raise RowError(f"{key} holds {IMAGE_TOKEN}; a caption is text alone")
    return [
        RowTurn("user", "user", f"{IMAGE_TOKEN}\n{context.prompt}", (None,)),
        RowTurn("assistant", key, answer, ()),
    ]


def _unfinished(fields: Mapping[str, Any]) -> str | None:
    """Why a line of `mmllm caption` is no answer to learn; None where it is one, or a row of something else."""
    if "model_hash" not in fields or "num_new_tokens" not in fields:
        return None
    if fields.get("finish") == "length":
        return (
            f"the caption was cut off after {fields['num_new_tokens']} tokens; run the same `mmllm caption` with a "
            "larger --max-new-tokens, which writes it anew"
        )
    return "the caption has no words" if fields.get("finish") == "empty" else None


# A row has exactly one of these keys.
SHAPES: dict[str, Callable[[Mapping[str, Any], Context], list[RowTurn]]] = {
    "conversations": _conversations,
    "messages": message_turns,
    "texts": _texts,
    "caption": functools.partial(_caption, "caption"),
    "text": functools.partial(_caption, "text"),
}
# Keys of the same formats that change what is to be learnt, so that leaving them out would be wrong.
UNSUPPORTED = {"videos", "video", "audios", "audio", "tools", "objects", "chosen", "rejected", "rejected_response"}
COLUMNS = {*PICTURE_SUFFIXES, *CAPTION_SUFFIXES, "json"}  # of tables that were made out of tars
READ = {*SHAPES, *UNSUPPORTED, "id", "image", "images", "system"}


def unread_keys(fields: Any) -> list[str]:
    """The keys of a row that say something which is not read, such as `source` or ratings."""
    said = (shorten(str(key)) for key, value in fields.items() if key not in READ and value not in (None, "", [], {}))
    return [key for key in said if not key.startswith("__") and key.rsplit(".", 1)[-1].lower() not in COLUMNS]


def _messages(turns: list[RowTurn], names: Mapping[Role, str]) -> tuple[Message, ...]:
    """An optional system turn, then user and assistant in turn, ending with an answer."""
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
                f"turn {index}, from {turn.name}, holds {IMAGE_TOKEN}; images stand in {names['user']} turns"
            )
        expected = ("assistant",) if turn.role == "user" else ("user",)
        messages.append(message(turn.role, text, num_images))
        num_images += len(turn.pictures)
    if messages[-1].role != "assistant":
        raise RowError(
            f"the last turn is from {turns[-1].name}; it must be from {names['assistant']}, as the answer to learn"
        )
    return tuple(messages)
