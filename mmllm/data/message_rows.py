"""Messages as OpenAI's client, TRL and transformers write them: a role, and text or a list of parts.

A key that holds null, an empty list or an empty text says nothing, and exporters write many of them. One that says
something which is not learnt here, such as the call of a tool, makes the row unusable, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmllm.batch import IMAGE_TOKEN, Role
from mmllm.data.row_pictures import RowPicture, check_text, kind, picture, picture_of_base64
from mmllm.data.turns import Context, RowTurn, list_of, object_of, role_of, text_turn
from mmllm.readers.files import RowError

# OpenAI's models of today call the system's role developer.
MESSAGE_ROLES: dict[str, Role] = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_TOOL_ROLES = {"tool", "function", "ipython", "tool_result"}
_UNIMPORTANT = {"name", "index", "id"}  # of a message, whatever they say
# What a message or part says by default, where it says it at all: OpenAI's and axolotl's marks of what is learnt.
_DEFAULTS = {"weight": (1,), "loss": (True, 1), "train": (True,), "end_turn": (True,)}
_TEXT_TYPES = ("text", "input_text", "output_text")
_IMAGE_TYPES = ("image", "image_url", "input_image")
PART_TYPES = (*_TEXT_TYPES, *_IMAGE_TYPES)
_IMAGE_KEYS = ("image", "image_url", "path", "url", "base64", "bytes", "source")


def message_turns(fields: Mapping[str, Any], context: Context) -> list[RowTurn]:
    """The turns of `messages`. Raises RowError."""
    turns = []
    for index, value in enumerate(list_of(fields["messages"], "messages", "turns")):
        where = f"turn {index}"
        turn = object_of(value, where, "role and content")
        if turn.get("role") in _TOOL_ROLES:
            raise RowError(f"{where} is from {turn['role']}: what tools answer is not learnt here; take the row out")
        role = role_of(turn.get("role"), MESSAGE_ROLES, where)
        if others := sorted(key for key in turn if key not in ("role", "content") and _says_something(key, turn[key])):
            raise RowError(f"{where} has {', '.join(others)}, which is not learnt here; allowed: role, content")
        content = turn.get("content")
        if isinstance(content, list):
            turns.append(_parts_turn(role, content, where))
        else:
            turns.append(text_turn(role, role, content, f"content of {where}"))
    return turns


def _says_something(key: str, value: Any) -> bool:
    if key in _UNIMPORTANT or any(value == default and type(value) is not str for default in _DEFAULTS.get(key, ())):
        return False
    return value not in (None, "", [], {}) and not (isinstance(value, dict) and all(v is None for v in value.values()))


def _parts_turn(role: Role, parts: list[Any], where: str) -> RowTurn:
    text, pictures = "", list[RowPicture | int | None]()
    for number, value in enumerate(parts):
        here = f"part {number} of {where}"
        part = object_of(value, here, "a type")
        type_ = part.get("type")
        if not isinstance(type_, str) or type_ not in PART_TYPES:
            raise RowError(f"{here} is of type {type_!r}; allowed: {', '.join(PART_TYPES)}")
        given = [key for key in _IMAGE_KEYS if part.get(key) not in ("", [], {}, None)]
        if type_ in _TEXT_TYPES:
            if given:
                raise RowError(f"{here} is of type {type_} but has {', '.join(given)}; make it two parts")
            piece = check_text(part.get("text"), f"text of {here}")
            text += piece
            pictures += [None] * piece.count(IMAGE_TOKEN)
            continue
        if part.get("text"):
            raise RowError(f"{here} is of type {type_} but has a text; make it two parts")
        text += IMAGE_TOKEN
        pictures.append(_part_picture(part, given, here))
    return RowTurn(role, role, text, tuple(pictures))


def _part_picture(part: Mapping[str, Any], given: list[str], where: str) -> RowPicture | int | None:
    """The picture of a part, the number of one of the row's, or None for the row's next one."""
    if set(given) == {"bytes", "path"}:
        return picture({"bytes": part["bytes"], "path": part["path"]}, where)
    if len(given) > 1:
        raise RowError(f"{where} has {' and '.join(given)}; keep one of them")
    if not given and part["type"] != "image":
        raise RowError(f"{part['type']} of {where} is an empty path; give the picture's")
    if not given:
        number = part.get("index")
        if number is None:
            return None
        if isinstance(number, float) and number.is_integer():  # of a table in which other rows have none
            number = int(number)
        if not isinstance(number, int) or isinstance(number, bool):
            raise RowError(f"index of {where} is {kind(number)}; it must be the number of a picture, from 0")
        return number
    (key,) = given
    value = part[key]
    if key == "base64":
        return picture_of_base64(value, f"base64 of {where}")
    if key == "source" and isinstance(value, dict):  # Anthropic's
        if value.get("data"):
            return picture_of_base64(value["data"], f"data of {where}")
        value = value.get("url")
    if isinstance(value, dict) and "url" in value:
        value = value["url"]
    if value in ("", None):
        raise RowError(f"{key} of {where} is an empty path; give the picture's")
    return picture(value, f"{key} of {where}")
