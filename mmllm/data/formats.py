"""The shapes of rows: a raw row of a data file, recognised by its keys, becomes an Example.

    conversations   LLaVA, LLaMA-Factory's sharegpt   [{"from": "human" | "gpt" | "system", "value": str}]
    messages        OpenAI, TRL, ms-swift             [{"role": "user" | "assistant" | "system", "content"}]
    texts           Cauldron, FineVision              [{"user": str, "assistant": str}], beside `images`
    caption, text   captions                          str, beside one image

A message's content is a string or a list of parts: `{"type": "text" | "image" | "image_url", ...}`. Beside them stand
`id`, `system` (str) and `image` or `images`: one picture or a list, each a path, `{"path", "bytes"}`, or bytes.
`<image>` in a text is the place of a picture. A turn's text is stripped at both ends and otherwise kept.
"""

from __future__ import annotations

import base64
import binascii
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm.batch import IMAGE_TOKEN, Example, Message, Role, message
from mmllm.data.files import RowError, Stored, is_url, join, local_path, read_range

# LLaVA's names, https://github.com/haotian-liu/LLaVA/blob/main/docs/Finetune_Custom_Data.md
ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}
MESSAGE_ROLES: dict[str, Role] = {"user": "user", "assistant": "assistant", "system": "system"}
PAIR: tuple[Role, Role] = ("user", "assistant")
PART_KEYS = {"text": "text", "image": "image", "image_url": "image_url"}  # a part's type: the key that holds it

Picture = str | bytes | Stored


@dataclass(frozen=True)
class Turn:
    """Who speaks, under which name, and what; `pictures` has one place a mark: None where the row's images fill it."""

    role: Role
    name: str
    text: str
    pictures: tuple[Picture | None, ...]


@dataclass(frozen=True)
class Context:
    """What a row does not say itself: where image paths start from, and the question that a caption answers."""

    images: str
    prompt: str


def kind(value: Any) -> str:
    """What a value is in JSON's words."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "bytes" if isinstance(value, bytes | Stored) else "a number")


def row_id(fields: Any, row: int) -> str:
    """The row's own id, or `#<row>`. Ids are the files' own: several rows may have the same."""
    own = fields.get("id") if isinstance(fields, dict) else None
    return str(own).encode(errors="replace").decode() if _is_id(own) else f"#{row}"  # a log takes no half characters


def _is_id(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool) and value != ""


def to_example(fields: Any, row: int, source: str, context: Context) -> Example:
    """The Example of a raw row, its pictures not yet read. Raises RowError with the reason where it cannot be one."""
    if not isinstance(fields, dict):
        raise RowError(f"the row is {kind(fields)}; it must be an object with {' or '.join(SHAPES)}")
    fields = {key: value for key, value in fields.items() if value is not None}
    own = fields.get("id", "")
    if own != "" and not _is_id(own):
        raise RowError(f"id is {kind(own)}; it must be a string or a whole number")
    shapes = [name for name in SHAPES if name in fields]
    if len(shapes) != 1:
        raise RowError(
            f"the row has {' and '.join(shapes)}, which say the same thing twice; keep one of them"
            if shapes
            else f"the row has none of {', '.join(SHAPES)}; its keys: {', '.join(map(str, fields)) or 'none'}"
        )
    for key in UNSUPPORTED & fields.keys():
        if fields[key]:
            raise RowError(f"the row has {key}, which cannot be learnt from here; take the key or the row out")
    pictures = _pictures(fields)
    turns = SHAPES[shapes[0]](fields, context)
    if system := fields.get("system"):
        turns.insert(0, _text_turn("system", "system", system, "system"))
    names = {role: name for name, role in (ROLES if shapes[0] == "conversations" else MESSAGE_ROLES).items()}
    messages = _messages(turns, names)
    # what is `Stored` is read before an example leaves this room
    images: Any = tuple(_place(turns, pictures, names["user"], context))
    return Example(row_id(fields, row), source, messages, images)


# Pictures


def _pictures(fields: Mapping[str, Any]) -> list[Picture]:
    """What stands beside the turns, paths as they are given."""
    given = [(key, fields[key]) for key in ("image", "images") if fields.get(key) not in (None, [])]
    if len(given) > 1:
        raise RowError("the row has image and images; keep one of them")
    if not given:
        return []
    key, value = given[0]
    return [_picture(one, key) for one in (value if isinstance(value, list) else [value])]


def _picture(value: Any, where: str) -> Picture:
    """A path as it is given, the bytes, or where they are stored."""
    if isinstance(value, dict) and {"path", "bytes"} & value.keys() and value.keys() <= {"path", "bytes"}:
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes | Stored):
        return value
    if not isinstance(value, str):
        raise RowError(f"{where} is {kind(value)}; it must be a string, a path, or an object with path or bytes")
    name = check_text(value, where)
    if not name:
        raise RowError(f"{where} is an empty path; leave {where} out of a row without images")
    if name.startswith("data:"):
        return _data_url(name, where)
    return local_path(name)


def _data_url(url: str, where: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise RowError(f"{where} begins with {head[:40]!r}; a data: URL must be data:image/...;base64,...")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise RowError(f"{where} is a data: URL whose base64 is damaged ({error})") from error


def _find(name: Picture, folder: str) -> Picture:
    if not isinstance(name, str):
        return name
    if is_url(name) and not (is_url(folder) and name.split("://")[0] == folder.split("://")[0]):
        raise RowError(
            f"{name[:200]} is an address; images are read from where the data is, so download it first"
        )  # a row must not decide which servers this machine asks
    path = name if is_url(name) else join(folder, name)
    if is_url(path):
        return Stored(path, functools.partial(read_range, path))
    try:
        is_there = Path(path).is_file()
    except OSError as error:
        raise RowError(f"{path} cannot be read ({error.strerror})") from error
    if not is_there:
        raise RowError(f"no image file at {path}; image paths start from {folder}, which `images` of the source sets")
    return path


def _place(turns: list[Turn], pictures: list[Picture], user: str, context: Context) -> Iterator[Picture]:
    """One picture a mark, in order. LLaVA lets one image without a mark pass, and then trains blind on that row."""
    places = [place for turn in turns for place in turn.pictures]
    num_open, num_images = sum(place is None for place in places), len(pictures)
    if num_open != num_images:
        marks = f"{num_open} {IMAGE_TOKEN} mark{'s' * (num_open != 1)}"
        images = f"{num_images} image{'s' * (num_images != 1)}"
        raise RowError(
            f"{marks} in the {user} turns but {images}; write {IMAGE_TOKEN} once for each image, where it stands"
        )
    waiting = iter(pictures)
    for place in places:
        yield _find(next(waiting) if place is None else place, context.images)


# Turns


def check_text(value: Any, where: str) -> str:
    """A string that can be tokenised. Raises RowError."""
    if not isinstance(value, str):
        raise RowError(f"{where} is {kind(value)}; it must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{where} holds half a character (\\u{ord(value[error.start]):04x}) at {error.start}") from error
    return value


def _text_turn(role: Role, name: str, value: Any, where: str) -> Turn:
    text = check_text(value, where)
    return Turn(role, name, text, (None,) * text.count(IMAGE_TOKEN))


def _list_of(value: Any, key: str, what: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise RowError(f"{key} is {'empty' if value == [] else kind(value)}; it must be a list of {what}")
    return value


def _object(value: Any, where: str, keys: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError(f"{where} is {kind(value)}; it must be an object with {keys}")
    return {key: one for key, one in value.items() if one is not None}


def _role(name: Any, roles: Mapping[str, Role], where: str) -> Role:
    if not isinstance(name, str) or name not in roles:
        raise RowError(f"{where} is from {name!r}; allowed: {', '.join(roles)}")
    return roles[name]


def _conversations(fields: Mapping[str, Any], context: Context) -> list[Turn]:
    turns = []
    for index, value in enumerate(_list_of(fields["conversations"], "conversations", "turns")):
        turn = _object(value, f"turn {index}", "from and value")
        role = _role(turn.get("from"), ROLES, f"turn {index}")
        turns.append(_text_turn(role, turn["from"], turn.get("value"), f"value of turn {index}"))
    return turns


def _messages_shape(fields: Mapping[str, Any], context: Context) -> list[Turn]:
    turns = []
    for index, value in enumerate(_list_of(fields["messages"], "messages", "turns")):
        turn = _object(value, f"turn {index}", "role and content")
        role = _role(turn.get("role"), MESSAGE_ROLES, f"turn {index}")
        if others := sorted(turn.keys() - {"role", "content"}):
            raise RowError(f"turn {index} has {', '.join(others)}; allowed: role, content")  # such as `loss: false`
        content = turn.get("content")
        if isinstance(content, list):
            turns.append(_parts_turn(role, content, f"turn {index}"))
        else:
            turns.append(_text_turn(role, role, content, f"content of turn {index}"))
    return turns


def _parts_turn(role: Role, parts: list[Any], where: str) -> Turn:
    text, pictures = "", list[Picture | None]()
    for number, value in enumerate(parts):
        here = f"part {number} of {where}"
        part = _object(value, here, "a type")
        type_ = part.get("type")
        if not isinstance(type_, str) or type_ not in PART_KEYS:
            raise RowError(f"{here} is of type {type_!r}; allowed: {', '.join(PART_KEYS)}")
        held = part.get(PART_KEYS[type_])
        if type_ == "text":
            piece = check_text(held, f"text of {here}")
            text += piece
            pictures += [None] * piece.count(IMAGE_TOKEN)
            continue
        if type_ == "image_url":
            held = held.get("url", "") if isinstance(held, dict) else "" if held is None else held
        text += IMAGE_TOKEN
        pictures.append(None if held is None else _picture(held, f"{type_} of {here}"))
    return Turn(role, role, text, tuple(pictures))


def _texts(fields: Mapping[str, Any], context: Context) -> list[Turn]:
    """Cauldron's pairs. Its texts have no marks: the pictures come first, as its own loaders place them."""
    turns = []
    for index, value in enumerate(_list_of(fields["texts"], "texts", "pairs")):
        pair = _object(value, f"text {index}", "user and assistant")
        turns += [_text_turn(role, role, pair.get(role), f"{role} of text {index}") for role in PAIR]
    given = fields.get("images", fields.get("image", []))
    num_images = len(given) if isinstance(given, list) else 1
    if num_images and not any(turn.pictures for turn in turns):
        turns[0] = _text_turn("user", "user", IMAGE_TOKEN * num_images + "\n" + turns[0].text, "text 0")
    return turns


def _caption(key: str, fields: Mapping[str, Any], context: Context) -> list[Turn]:
    if not fields.get("image", fields.get("images")):
        raise RowError(f"the row has {key} but no image; a caption needs the picture that it tells about")
    answer = check_text(fields[key], key)
    if reason := _unfinished(fields):
        raise RowError(reason)
    if IMAGE_TOKEN in answer:
        raise RowError(f"{key} holds {IMAGE_TOKEN}; a caption is text alone")
    return [
        Turn("user", "user", f"{IMAGE_TOKEN}\n{context.prompt}", (None,)),
        Turn("assistant", key, answer, ()),
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
SHAPES: dict[str, Callable[[Mapping[str, Any], Context], list[Turn]]] = {
    "conversations": _conversations,
    "messages": _messages_shape,
    "texts": _texts,
    "caption": functools.partial(_caption, "caption"),
    "text": functools.partial(_caption, "text"),
}
# Keys of the same formats that change what is to be learnt, so that leaving them out would be wrong.
UNSUPPORTED = {"videos", "video", "audios", "audio", "tools", "objects", "chosen", "rejected", "rejected_response"}
READ = {*SHAPES, *UNSUPPORTED, "id", "image", "images", "system"}


def unread_keys(fields: Any) -> list[str]:
    """The keys of a row that say something which is not read, such as `source` or ratings."""
    return [str(key) for key, value in fields.items() if key not in READ and value not in (None, "", [], {})]


def _messages(turns: list[Turn], names: Mapping[Role, str]) -> tuple[Message, ...]:
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
